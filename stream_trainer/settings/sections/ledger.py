"""Settings of the ledger: which record was trained on, and what became of the others."""

from stream_trainer.settings.base import Positive, Section


class LedgerSettings(Section):
    """A row for each record that was decided, in Parquet files beside the checkpoints. Needs the `ledger` extra."""

    enabled: bool = False
    """Whether the ledger is kept. It begins with the records that are decided from then on."""
    keep_days: Positive | None = 365.0
    """Days that rows stay. `null`: for ever. About 2 bytes a record, some 30 where samples have a random `id`."""
