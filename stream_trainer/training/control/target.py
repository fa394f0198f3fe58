"""Another target while the run goes on: read, proven, and only then put in the place of the one before."""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gradient_selectors.target import Target, TargetError, mean_loss
from gradient_selectors.world.base import World, gathered

from stream_trainer.checkpoints.fingerprint import TARGET_CONTENTS, digest_of_file
from stream_trainer.errors import SettingsError
from stream_trainer.models.refusals import first_line
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.samples.decoder import Decoder, read_samples
from stream_trainer.training.build import make_budget, split_target
from stream_trainer.training.control.kept import KeptTarget
from stream_trainer.training.draw.paying import RestingSampler
from stream_trainer.training.draw.pools import PoolSampler
from stream_trainer.training.draw.sampling import make_sampler
from stream_trainer.training.draw.waiting import BanditSampler, LearnedSampler, RivalSampler

if TYPE_CHECKING:
    from stream_trainer.training.trainer import Trainer


@dataclass(frozen=True)
class Proven:
    """A target that can take over.

    Attributes:
        target: with its first gradient; None if nothing reads one.
        sampler: whose draws follow this target, with all that waits.
        held: samples that steer nothing.
    """

    digest: str
    samples: list[Sample]
    loss: float
    target: Target | None
    sampler: PoolSampler
    held: list[Sample]


def replace_target(trainer: "Trainer", kept: KeptTarget | None = None) -> str:
    """Let `target.path` as it is now take over, and make a checkpoint; what it came to, for people.

    With `kept`, what its topic holds now.

    What a draw has learned of utilities was learned for the target before, so it begins afresh. Raises SettingsError
    with the reason if the file is refused: all is as it was then.
    """
    path, named, started = trainer.settings.target.path, "target.path", time.perf_counter()
    if kept is not None:
        path, named = kept.candidate, kept.setting
        if not path.exists():
            return f"{kept.named} holds the target already"
    proven, refusal = None, None
    try:
        with nullcontext() if kept is None else kept.lock:
            proven = _prove(trainer, path, named)
            if kept is not None:
                kept.accept()
    except Exception as error:
        refusal = _refusal(error, f"{named}={path}")
    refusal = _agreed(trainer.engine.world, refusal, proven, f"{named}={path}")
    if refusal is not None:
        trainer.watchers.event(trainer.step, "target_refused", refusal)
        raise SettingsError(f"{refusal}; the target before stays")
    if proven is None:
        return f"{path} is the target already"
    _take_over(trainer, proven)
    text = f"{len(proven.samples)} samples of {path if kept is None else kept.named}, loss {proven.loss:.4f}"
    trainer.watchers.event(trainer.step, "target_replaced", text)
    trainer.watchers.evaluation(trainer.step, trainer.evaluations.losses, time.perf_counter() - started)
    trainer.checkpoint()  # a run that is resumed must not find the new file with the state of the old one
    return text


def _refusal(error: Exception, named: str) -> str:
    known = isinstance(error, SettingsError | TargetError)
    why = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
    return why if isinstance(error, SettingsError) else f"{named}: {why}"


def _agreed(world: World, refusal: str | None, proven: Proven | None, named: str) -> str | None:
    """Why the target is refused, on every rank if on any; None if all take the same one."""
    if world.size == 1:
        return refusal
    said = gathered(world, [refusal, None if proven is None else proven.digest])
    found = next((why for why, _ in said if why is not None), None)
    if found is None and any(digest != said[0][1] for _, digest in said):
        return f"{named} is not the same for all processes; put it on a file system that they share"
    return found


def _prove(trainer: "Trainer", path: Path, named: str) -> Proven | None:
    """Everything that may fail, before anything is changed; None if the file is the one in use."""
    settings, loaded, engine = trainer.settings, trainer.loaded, trainer.engine
    if engine.capture.is_sharded:
        raise SettingsError("distributed.mode=fsdp2 cannot go on with another target yet; start the run again with it")
    digest = digest_of_file(path)
    if digest is None:
        raise SettingsError(f"{named}={path} is no file; put it there")
    if digest == trainer.saver.fingerprint.get(TARGET_CONTENTS):
        return None
    decoder = Decoder(loaded.tokenizer, settings.samples, loaded.max_positions, settings.selection.field_names)
    samples = read_samples(path, decoder, settings.target.max_samples, named)
    if digest_of_file(path) != digest:
        raise SettingsError(f"{named}={path} changes while it is read; write it elsewhere and rename it")
    steering, held = split_target(settings, samples)
    loss = mean_loss(engine.capture, [collate(samples, loaded.tokenizer.pad_token_id)])
    if not math.isfinite(loss):
        raise SettingsError(f"{named}={path}: its loss is {loss}; correct its samples")
    target = engine.target
    if target is not None:
        batch = collate(steering, loaded.tokenizer.pad_token_id)
        target = target.renewed([batch], engine.capture, make_budget(settings).micro_tokens)
    return Proven(digest, samples, loss, target, _sampler_for(trainer, steering), held)


def _sampler_for(trainer: "Trainer", samples: list[Sample]) -> PoolSampler:
    """A sampler that draws for these samples; the same one where it looks at none."""
    old = trainer.sampler
    if isinstance(old, RestingSampler):
        return replace(old, inner=_drawing_for(trainer, old.inner, samples))
    return _drawing_for(trainer, old, samples)


def _drawing_for(trainer: "Trainer", old: PoolSampler, samples: list[Sample]) -> PoolSampler:
    if not isinstance(old, BanditSampler | LearnedSampler | RivalSampler):
        return old
    new = make_sampler(trainer.settings, trainer.buffer, trainer.loaded, trainer.engine, samples, trainer.accuse)
    assert isinstance(new, BanditSampler | LearnedSampler | RivalSampler)
    return replace(new, room=old.room)


def _take_over(trainer: "Trainer", proven: Proven) -> None:
    trainer.engine.target = proven.target
    trainer.engine.scoring.reset()
    trainer.sampler = proven.sampler
    if trainer.paying.shadows is not None:
        trainer.paying.shadows.held = proven.held
    trainer.evaluations.replace_target(trainer.step, proven.samples, proven.loss)
    trainer.saver.fingerprint = {**trainer.saver.fingerprint, TARGET_CONTENTS: proven.digest}
