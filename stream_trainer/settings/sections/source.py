"""Settings of the stream: a Kafka topic, or a file."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator

from stream_trainer.settings.base import Positive, Section
from stream_trainer.settings.sections.registry import RegistrySettings

DIRECTORY = "{directory}"


class KafkaSettings(Section):
    """A Kafka topic. Checkpoints keep the offsets. The consumer group's offsets are committed for lag tools, and a run
    without a checkpoint begins there.
    """

    bootstrap_servers: str = "localhost:9092"
    """Brokers to connect to first, `host:port[,host:port...]`."""
    topic: Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{1,249}$")] | None = None
    """Topic to train on. Required when `source.kind` is `kafka`."""
    format: Literal["json", "avro", "protobuf", "json_schema"] = "json"
    """What the records' values are. All but `json` begin with the number of a schema, or have it in a header, and
    need `schema_registry.url` (and the `schema` extra)."""
    schema_registry: RegistrySettings = RegistrySettings()
    group_id: str | None = f"stream-trainer-{DIRECTORY}"
    """Consumer group under which offsets are committed, so that lag tools see the progress. `{directory}` becomes 8
    digits that tell the path of `checkpoint.dir`: two trainers need two groups. With null none are committed, and a run
    without a checkpoint begins at `start`."""
    start: Literal["earliest", "latest"] = "earliest"
    """Where to begin in a partition for which neither a checkpoint nor the group has an offset."""
    on_lost_checkpoint: Literal["fail", "continue", "start_over"] = "fail"
    """If the group's offset was committed at a later step, but there is no checkpoint: stop (`fail`), read on from that
    offset with the model as it is (`continue`), or begin where `start` says (`start_over`)."""
    on_data_loss: Literal["fail", "skip"] = "fail"
    """If undecided records are gone from the log: stop with the reason (`fail`), or `skip` and count them as lost."""
    on_undecodable: Literal["fail", "skip"] = "fail"
    """If records in the log cannot be decoded: stop and name their offsets (`fail`), or dead-letter them (`skip`)."""
    stop_at_end: bool = False
    """End the run when every record that was in the topic at the start is decided. For batch jobs and tests."""
    transaction_wait_s: Positive = 90.0
    """Seconds that a run with `stop_at_end` waits for an open transaction that holds records back. After that it fails.
    Kafka aborts a transaction after 60 s by default."""
    fencing: Literal["auto", "off"] = "auto"
    """Whether a trainer ends when another one takes its group and topic over. `auto`: if the brokers have transactions.
    It needs the right to write to the transactional id `GROUP-TOPIC`."""
    discovery_interval_s: Positive = 30.0
    """Seconds between checks for new partitions. These are read from their earliest record."""
    bootstrap_timeout_s: Positive = 30.0
    """Seconds to wait for a broker at start-up. A run with `stop_at_end` then fails, any other tries again."""
    api_version: Annotated[str, Field(pattern=r"^\d+\.\d+$")] | None = None
    """Version of Kafka whose requests are sent, for example `2.3`. Unset, the brokers are asked, which is right unless
    they cannot answer."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """Protocol of the connections to the brokers."""
    ssl_cafile: Path | None = None
    """PEM file of the certificate authorities to trust; the system's when unset."""
    ssl_certfile: Path | None = None
    """PEM file of the client's certificate, for mutual TLS."""
    ssl_keyfile: Path | None = None
    """PEM file of the client's private key, for mutual TLS."""
    ssl_password: SecretStr | None = None
    """Password of the client's private key."""
    ssl_password_file: Path | None = None
    """File with the password of the client's private key, as an absolute path. Instead of `ssl_password`."""
    ssl_check_hostname: bool = True
    """Whether the broker's certificate must name the host."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = None
    """SASL mechanism; required by the SASL protocols."""
    sasl_username: str | None = None
    """SASL user name, for PLAIN and SCRAM."""
    sasl_password: SecretStr | None = None
    """SASL password, for PLAIN and SCRAM. Set it in the environment rather than in the file."""
    sasl_password_file: Path | None = None
    """File with the SASL password, as an absolute path. Instead of `sasl_password`."""
    sasl_token_file: Path | None = None
    """File with the token for OAUTHBEARER, as an absolute path. It is read anew for every connection, so that another
    program may renew it."""

    @model_validator(mode="after")
    def _schemas_come_from_somewhere(self) -> Self:
        if self.format != "json" and self.schema_registry.url is None:
            raise ValueError(f"format={self.format} needs schema_registry.url; set the address of the registry")
        return self

    @model_validator(mode="after")
    def _security_is_complete(self) -> Self:
        if self.security_protocol.startswith("SASL"):
            for names in self._needed():
                if all(getattr(self, name) is None for name in names):
                    raise ValueError(f"security_protocol={self.security_protocol} needs {' or '.join(names)}; set it")
        elif self.sasl_mechanism is not None:
            raise ValueError(
                f"sasl_mechanism={self.sasl_mechanism} has no effect with security_protocol="
                f"{self.security_protocol}; set security_protocol to SASL_SSL or SASL_PLAINTEXT"
            )
        return self

    def _needed(self) -> list[tuple[str, ...]]:
        """What SASL needs; of each only one."""
        if self.sasl_mechanism == "OAUTHBEARER":
            return [("sasl_token_file",)]
        return [("sasl_mechanism",), ("sasl_username",), ("sasl_password", "sasl_password_file")]

    @model_validator(mode="after")
    def _secrets_are_where_they_belong(self) -> Self:
        """None of these messages quotes a value: it may be the secret itself."""
        if "@" in self.bootstrap_servers:
            raise ValueError(
                "bootstrap_servers takes host:port only, without a user; give that as sasl_username and sasl_password"
            )
        for name in ("sasl_password", "ssl_password"):
            if getattr(self, name) is not None and getattr(self, f"{name}_file") is not None:
                raise ValueError(f"{name} and {name}_file exclude each other; set one of them")
        for name in ("sasl_password_file", "ssl_password_file", "sasl_token_file"):
            path = getattr(self, name)
            if path is not None and not path.is_absolute():
                raise ValueError(f"{name} is no absolute path; name the file that holds the secret, not the secret")
        return self


class JsonlSettings(Section):
    """A file with one JSON object a line, or standard input."""

    path: str | None = None
    """File to read, or `-` for standard input. Required when `source.kind` is `jsonl`."""
    follow: bool = False
    """Wait for the file to grow, instead of ending the run at the end of the file."""


class SourceSettings(Section):
    """Where records come from."""

    kind: Literal["kafka", "jsonl"] = "kafka"
    """`kafka` for a topic, `jsonl` for a file or standard input."""
    kafka: KafkaSettings = KafkaSettings()
    jsonl: JsonlSettings = JsonlSettings()

    def with_group_of(self, digits: str) -> Self:
        """The same, with the name of the group complete."""
        if self.kafka.group_id is None or DIRECTORY not in self.kafka.group_id:
            return self
        named = {"group_id": self.kafka.group_id.replace(DIRECTORY, digits)}
        return self.model_copy(update={"kafka": self.kafka.model_copy(update=named)})

    @model_validator(mode="after")
    def _kind_is_configured(self) -> Self:
        if self.kind == "kafka" and self.kafka.topic is None:
            raise ValueError("kind=kafka needs kafka.topic; name the topic to train on")
        if self.kind == "jsonl" and self.jsonl.path is None:
            raise ValueError("kind=jsonl needs jsonl.path; name a file, or - for standard input")
        return self
