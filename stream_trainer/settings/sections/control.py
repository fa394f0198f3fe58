"""Settings of the address that takes orders."""

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, model_validator

from stream_trainer.settings.base import Section

TOKEN = re.compile(r"[\x21-\x7e]{16,512}")  # what a header can carry and nobody guesses
TOKEN_RULE = "needs 16 to 512 printable ASCII characters without spaces"  # noqa: S105


class ControlSettings(Section):
    """HTTP address that takes orders: pause, resume, checkpoint, reload the target. Every request needs the token."""

    enabled: bool = False
    """Whether orders are taken."""
    host: str = "127.0.0.1"
    """Address to listen on. The token travels unencrypted, so put TLS in front of any other address."""
    port: Annotated[int, Field(ge=0, le=65535)] = 9465
    """Port to listen on. 0 takes a free port and logs it."""
    token: SecretStr | None = None
    """Secret that every request must bring. Set it in the environment rather than in the file."""
    token_file: Path | None = None
    """File with the token, as an absolute path. Instead of `token`."""

    @model_validator(mode="after")
    def _token_is_given(self) -> Self:
        """None of these messages quotes a value: it may be the secret itself."""
        if self.enabled and self.token is None and self.token_file is None:
            raise ValueError("enabled=true needs token or token_file; set STREAM_TRAINER_CONTROL__TOKEN")
        if self.token is not None and self.token_file is not None:
            raise ValueError("token and token_file exclude each other; set one of them")
        if self.token is not None and not TOKEN.fullmatch(self.token.get_secret_value()):
            raise ValueError(f"token {TOKEN_RULE}; make one with: openssl rand -hex 32")
        if self.token_file is not None and not self.token_file.is_absolute():
            raise ValueError("token_file is no absolute path; name the file that holds the token, not the token")
        return self
