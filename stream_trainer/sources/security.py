"""What the client needs to encrypt and to identify itself: options from settings, secrets from files, and whether the
TLS files fit, found out before anything connects. No message here quotes a secret.
"""

import re
import ssl
from pathlib import Path
from typing import Any

from kafka.net.sasl.oauth import AbstractTokenProvider

from stream_trainer.errors import SettingsError
from stream_trainer.settings.secrets import read_secret, secret_of
from stream_trainer.settings.sections.source import KafkaSettings


def security_options(settings: KafkaSettings) -> dict[str, Any]:
    """The options of kafka-python for TLS and SASL.

    Raises SettingsError, naming setting, file and remedy, for a file that is missing or does not fit.
    """
    key_password = secret_of(settings, "source.kafka", "ssl_password")
    for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        path = getattr(settings, name)
        if path is not None and not path.is_file():
            raise SettingsError(f"source.kafka.{name}={path} cannot be read (it is no file); correct the path")
    if settings.security_protocol in ("SSL", "SASL_SSL"):
        _check_authorities(settings.ssl_cafile)
        _check_own_certificate(settings, key_password)
    options: dict[str, Any] = {
        "security_protocol": settings.security_protocol,
        "ssl_cafile": _text(settings.ssl_cafile),
        "ssl_certfile": _text(settings.ssl_certfile),
        "ssl_keyfile": _text(settings.ssl_keyfile),
        "ssl_password": key_password,
        "ssl_check_hostname": settings.ssl_check_hostname,
        "sasl_mechanism": settings.sasl_mechanism,
        "sasl_plain_username": settings.sasl_username,
        "sasl_plain_password": secret_of(settings, "source.kafka", "sasl_password"),
    }
    if settings.sasl_token_file is not None:
        provider = TokenFile(settings.sasl_token_file)
        provider.token()  # says at once what the client would say after its whole timeout
        options["sasl_oauth_token_provider"] = provider
    return options


class TokenFile(AbstractTokenProvider):  # type: ignore[misc]
    """The token for OAUTHBEARER. Read for every connection, so that a renewed one is used without a restart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def token(self) -> str:
        """Raises SettingsError if the file holds none."""
        token = read_secret("source.kafka.sasl_token_file", self._path)
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise SettingsError(
                f"source.kafka.sasl_token_file={self._path} holds no token: it has a space or a sign that tokens "
                "lack; write the token alone into it"
            )
        return token


def _check_authorities(path: Path | None) -> None:
    if path is not None and not _holds_certificates(path):
        raise SettingsError(
            f"source.kafka.ssl_cafile={path} holds no certificate that can be read; name a PEM file with the brokers' "
            "authority"
        )


def _check_own_certificate(settings: KafkaSettings, password: str | None) -> None:
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile
    if certificate is None:
        if key is not None:
            raise SettingsError(
                f"source.kafka.ssl_keyfile={key} has no effect without source.kafka.ssl_certfile; set that too"
            )
        return
    if not _holds_certificates(certificate):
        raise SettingsError(
            f"source.kafka.ssl_certfile={certificate} holds no certificate that can be read; name a PEM file with the "
            "client's certificate"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        # Without any password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password=password or "")
    except (ssl.SSLError, ValueError) as error:
        raise SettingsError(_key_problem(certificate, key, password, getattr(error, "reason", None))) from None
    except OSError as error:
        raise SettingsError(
            f"source.kafka.ssl_keyfile={key} cannot be read ({error.strerror}); correct its permissions"
        ) from None


def _key_problem(certificate: Path, key: Path | None, password: str | None, reason: str | None) -> str:
    """Why the key does not go with the certificate."""
    held = (key or certificate).read_bytes()
    if b"PRIVATE KEY-----" not in held:
        if key is None:
            return (
                f"source.kafka.ssl_certfile={certificate} holds no private key, and source.kafka.ssl_keyfile is unset; "
                "set it to the PEM file of the key"
            )
        return f"source.kafka.ssl_keyfile={key} holds no private key; name the PEM file of the client's key"
    named = f"source.kafka.ssl_keyfile={key or certificate}"
    if reason == "KEY_VALUES_MISMATCH":
        return f"{named} is the key of another certificate than source.kafka.ssl_certfile={certificate}; name its own"
    if b"ENCRYPTED" in held:
        what = "does not open" if password else "is unset but needed for"
        return f"source.kafka.ssl_password {what} {named}; set the password of this key"
    return f"{named} holds a private key that cannot be read; name the PEM file of the client's key"


def _holds_certificates(path: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (ssl.SSLError, OSError):
        return False
    return True


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
