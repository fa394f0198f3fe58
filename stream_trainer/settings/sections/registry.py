"""Settings of a Schema Registry: where it is, and how we prove who we are."""

from pathlib import Path
from typing import Self

from pydantic import SecretStr, model_validator

from stream_trainer.settings.base import Positive, Section


class RegistrySettings(Section):
    """The Schema Registry that knows the records' schemas. It is asked once for each schema."""

    url: str | None = None
    """Address of the registry, `https://host:port`; several that hold the same, with commas between them."""
    username: str | None = None
    """User name for basic authentication."""
    password: SecretStr | None = None
    """Password for basic authentication. Set it in the environment rather than in the file."""
    password_file: Path | None = None
    """File with that password, as an absolute path. Instead of `password`."""
    ssl_cafile: Path | None = None
    """PEM file of the certificate authorities to trust; the usual ones when unset."""
    ssl_certfile: Path | None = None
    """PEM file of the client's certificate, for mutual TLS."""
    ssl_keyfile: Path | None = None
    """PEM file of the client's private key, for mutual TLS."""
    ssl_password: SecretStr | None = None
    """Password of the client's private key."""
    ssl_password_file: Path | None = None
    """File with the password of the client's private key, as an absolute path. Instead of `ssl_password`."""
    timeout_s: Positive = 5.0
    """Seconds to wait for an answer. Without one, reading pauses and the registry is asked again later."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """None of these messages quotes a value: it may be the secret itself."""
        if self.url is not None and "@" in self.url:
            raise ValueError("url takes no user; give that as username and password")
        if self.url is not None and not all(part.strip().startswith(("http://", "https://")) for part in self._urls):
            raise ValueError("url begins with neither http:// nor https://; write https://host:port")
        for name in ("password", "ssl_password"):
            path = getattr(self, f"{name}_file")
            if getattr(self, name) is not None and path is not None:
                raise ValueError(f"{name} and {name}_file exclude each other; set one of them")
            if path is not None and not path.is_absolute():
                raise ValueError(
                    f"{name}_file is no absolute path; name the file that holds the secret, not the secret"
                )
        if (self.username is None) != (self.password is None and self.password_file is None):
            raise ValueError("username and a password go together; set both, or neither")
        if self.ssl_certfile is None and (self.ssl_keyfile is not None or self.ssl_password is not None):
            raise ValueError("ssl_keyfile needs ssl_certfile, the certificate of that key; set it")
        return self

    @property
    def _urls(self) -> list[str]:
        return (self.url or "").split(",")
