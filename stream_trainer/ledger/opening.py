"""Open the ledger of a run, if it has one."""

from stream_trainer.checkpoints.ownership import Owner
from stream_trainer.errors import SettingsError
from stream_trainer.ledger.names import NEEDS
from stream_trainer.records import Decisions
from stream_trainer.settings.sections.ledger import LedgerSettings


def open_ledger(settings: LedgerSettings, owner: Owner, decided: int) -> Decisions | None:
    """The ledger of a run that resumes after `decided` decisions; None where there is to be none.

    Raises SettingsError if a package is missing, CheckpointError if it cannot be written.
    """
    if not settings.enabled:
        return None
    try:
        from stream_trainer.ledger.book import Ledger
    except ImportError as error:
        raise SettingsError(f"ledger.enabled=true {NEEDS}") from error
    ledger = Ledger(owner.directory, owner, decided, settings.keep_days)
    ledger.begin()
    return ledger
