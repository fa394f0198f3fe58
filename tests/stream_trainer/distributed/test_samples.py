"""What another rank gets of a sample is all of it but its record."""

from dataclasses import replace

from stream_trainer.distributed.samples import from_bytes, to_bytes
from stream_trainer.records import Partition, Record, Sample

PARTITION = Partition("a:b", 3)
FULL = Sample(
    (1, 2, 3), (-100, 2, 3), PARTITION, 7, 40, 0.1, 1.5, "näme", "web", (("a", "x"),), Record(PARTITION, 7, 8, b"{}")
)


def test_samples_arrive_as_they_were() -> None:
    samples = [FULL, Sample((2**40,), (5,), PARTITION, 9, 0)]
    assert from_bytes(to_bytes(samples)) == samples
    assert from_bytes(to_bytes(samples))[0] == replace(FULL, record=None)
    assert from_bytes(to_bytes([])) == []
