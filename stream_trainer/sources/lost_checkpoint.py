"""What to do where a group's offset tells of steps, and no checkpoint has them."""

import re

from stream_trainer.errors import CheckpointError
from stream_trainer.records import Partition
from stream_trainer.settings.sections.source import KafkaSettings


def may_begin(settings: KafkaSettings, partition: Partition, offset: int, metadata: str | None) -> bool:
    """Whether to begin at the committed offset. If a step was made before it, it was by a model that is not there.

    `metadata` is what a commit of ours says, `step=42`. Raises CheckpointError if the settings leave that open.
    """
    made = re.match(r"step=([1-9]\d*)\b", metadata or "")
    if made is None:
        return True
    if settings.on_lost_checkpoint == "fail":
        raise CheckpointError(
            f"source.kafka.group_id={settings.group_id} stands at offset {offset} of partition {partition.number}, put "
            f"there at step {made[1]}, but checkpoint.dir has no checkpoint of it; restore one, or set "
            "source.kafka.on_lost_checkpoint to continue (read on from there with this model) or start_over; if "
            "another trainer did that, name another source.kafka.group_id"
        )
    return settings.on_lost_checkpoint == "continue"
