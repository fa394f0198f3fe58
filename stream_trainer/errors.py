"""The exception tree. Every message is one line that names the setting or object, its value and the remedy.

StreamTrainerError            exit code 1
├── NotAsPlannedError         exit code 1   a replay cannot make a step again as it was recorded
├── SettingsError             exit code 2   a setting is wrong, or names something that is not there
├── SourceError               exit code 3   the stream cannot be read
│   ├── SourceAwayError       exit code 3   nobody answers, which may mend itself
│   └── DataLossError         exit code 4   records that were never decided are gone from the stream
├── CheckpointError           exit code 5   a checkpoint cannot be written, or none can be trusted
│   └── NotFiniteError        exit code 5   the model is spoilt: what would be written is not finite
├── FencedError               exit code 6   another trainer has the checkpoint directory
├── TrainingError             exit code 7   training cannot go on: the model dies again and again, or no step works
├── PoisonError               exit code 8   too many records of the stream cannot be used
├── GroupError                exit code 9   another process of the run has ended, or does not answer
├── ControlError              exit code 1   a trainer does not answer, or refuses an order
└── SampleError               (never fatal) one record cannot become a sample: it is dead-lettered
"""


class StreamTrainerError(Exception):
    """Base of every error that is reported in one line instead of a traceback."""

    exit_code = 1


class NotAsPlannedError(StreamTrainerError):
    """A step cannot be made again as it was.

    Attributes:
        gone: whether that is because records are gone, and not because of another result.
    """

    def __init__(self, message: str, *, gone: bool) -> None:
        super().__init__(message)
        self.gone = gone


class SettingsError(StreamTrainerError):
    """A setting is wrong, or names a file, model or topic that is not there. The user can mend it."""

    exit_code = 2


class SourceError(StreamTrainerError):
    """The stream cannot be read or written."""

    exit_code = 3


class DataLossError(SourceError):
    """Records between the cursor and the start of the log are gone, or the log ends before the cursor."""

    exit_code = 4


class SourceAwayError(SourceError):
    """Nobody answers, which may mend itself: a later `start` may succeed."""


class CheckpointError(StreamTrainerError):
    """A checkpoint cannot be written, or none that exists can be trusted."""

    exit_code = 5


class NotFiniteError(CheckpointError):
    """Weights or optimizer state are not finite, so they are not written: every checkpoint that is kept is sound."""


class FencedError(StreamTrainerError):
    """Another trainer has the checkpoint directory, or has taken it over. Nothing more is written."""

    exit_code = 6


class TrainingError(StreamTrainerError):
    """The model dies again after every rollback, or steps or the first evaluation fail whatever their samples are."""

    exit_code = 7


class PoisonError(StreamTrainerError):
    """So many records cannot be used that something is wrong with the stream or the settings, not with a record."""

    exit_code = 8


class GroupError(StreamTrainerError):
    """Another process of the run has ended or does not answer. Nothing is written: the last checkpoint holds."""

    exit_code = 9


class ControlError(StreamTrainerError):
    """A trainer does not answer, refuses an order, or does not obey it in time."""


class SampleError(StreamTrainerError):
    """One record cannot become a sample.

    Attributes:
        reason: one of `samples.REASONS`, a closed set fit for a metric label.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
