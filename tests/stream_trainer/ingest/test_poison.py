"""A poisoned stream is told from a noisy one, over restarts too, and the error says what is wrong."""

import random
from collections.abc import Sequence

import pytest

from stream_trainer.errors import PoisonError
from stream_trainer.ingest.poison import HINTS, PoisonWatch
from stream_trainer.records import Partition
from stream_trainer.samples.decoder import REASONS
from stream_trainer.settings.schema import DeadLetterSettings

LOGS = [Partition("samples", number) for number in range(3)]
OFF = {"max_ratio": None, "max_in_a_row": None}


def limits(**values: object) -> DeadLetterSettings:
    return DeadLetterSettings.model_validate(values)


def read(watch: PoisonWatch, reasons: Sequence[str | None], partition: Partition = LOGS[0], first: int = 0) -> int:
    """Let the watch see these. Returns how many it saw before it raised, all if it did not."""
    for index, reason in enumerate(reasons):
        watch.note(partition, first + index, reason)
        if reason is not None:
            try:
                watch.check()
            except PoisonError:
                return index + 1
    return len(reasons)


def test_a_stream_of_poison_alone_ends_after_a_thousand() -> None:
    assert read(PoisonWatch(DeadLetterSettings()), ["bad_json"] * 3000) == 1000


def test_partitions_are_counted_together() -> None:
    watch = PoisonWatch(limits(max_in_a_row=30, window=30))
    for offset in range(29):
        read(watch, ["bad_json"], LOGS[offset % 3], offset)
    watch.check()
    watch.note(LOGS[2], 29, "bad_json")
    with pytest.raises(PoisonError, match=r"^dead_letters.max_in_a_row=30: 30 records in a row cannot be used"):
        watch.check()


def test_one_poisoned_partition_among_good_ones_is_found() -> None:
    watch = PoisonWatch(limits(max_in_a_row=50, window=100))
    for offset in range(49):
        assert read(watch, ["bad_json"], LOGS[0], offset) == 1
        read(watch, [None] * 20, LOGS[1], 20 * offset)
        watch.check()
    watch.note(LOGS[0], 49, "bad_json")
    with pytest.raises(PoisonError):
        watch.check()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.8])
def test_noise_never_stops_a_run(share: float) -> None:
    rng = random.Random(5)
    reasons = ["bad_json" if rng.random() < share else None for _ in range(20_000)]
    assert read(PoisonWatch(DeadLetterSettings()), reasons) == 20_000


def test_too_large_a_share_stops_it_once_the_window_is_full() -> None:
    reasons = ["bad_json", "bad_json", "empty", None] * 100
    watch = PoisonWatch(limits(max_ratio=0.7, max_in_a_row=None, window=100))
    assert read(watch, reasons) == 101  # a window is needed, and only a bad record tells
    with pytest.raises(PoisonError) as caught:
        watch.check()
    assert str(caught.value) == (
        "dead_letters.max_ratio=0.7: 75 of the last 100 records cannot be used, 50 of them for bad_json "
        "(write one JSON object a record); mend that and start again, or raise the limit to read past them"
    )


def test_limits_can_be_off() -> None:
    assert read(PoisonWatch(limits(**OFF)), ["bad_json"] * 5000) == 5000


def test_only_the_last_records_count() -> None:
    watch = PoisonWatch(limits(max_ratio=0.5, max_in_a_row=None, window=10))
    assert read(watch, [*["empty"] * 5, *[None] * 100, *["empty"] * 5, None, "empty"]) == 112
    assert watch.ratio == 0.6


@pytest.mark.parametrize("seed", range(20))
def test_a_restart_counts_every_record_once(seed: int) -> None:
    """Wherever it falls and whatever is undecided then, the end is that of a run that was not stopped."""
    rng = random.Random(seed)
    reasons = [rng.choice([None, None, "bad_json", "empty"]) for _ in range(60)]
    whole, first, second = (PoisonWatch(limits(**OFF, window=16)) for _ in range(3))
    read(whole, reasons)
    stop = rng.randrange(60)
    position = rng.randrange(stop + 1)
    decided = {offset for offset in range(position, stop) if reasons[offset] or rng.random() < 0.5}
    read(first, reasons[:stop])
    second.load_state_dict(first.state_dict({LOGS[0]: position}))
    for offset in range(position, 60):
        if offset in decided:
            second.note_again(LOGS[0], offset)
        else:
            second.note(LOGS[0], offset, reasons[offset])
    assert second.state_dict({LOGS[0]: 60}) == whole.state_dict({LOGS[0]: 60})


def test_a_restart_does_not_forget_the_poison() -> None:
    first, second = PoisonWatch(limits()), PoisonWatch(limits())
    read(first, ["bad_json"] * 999)
    second.load_state_dict(first.state_dict({LOGS[0]: 999}))
    assert read(second, ["bad_json"], first=999) == 1
    with pytest.raises(PoisonError, match="1000 records in a row"):
        second.check()


def test_every_reason_has_a_hint() -> None:
    assert HINTS.keys() == set(REASONS)


def test_a_row_that_does_not_fit_the_window_is_a_wrong_setting() -> None:
    with pytest.raises(ValueError, match="max_in_a_row=2000 is more than window=1000; raise window"):
        limits(max_in_a_row=2000)
