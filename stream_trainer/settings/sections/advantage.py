"""Settings of the question whether selection pays."""

from typing import Annotated, Literal

from pydantic import Field

from stream_trainer.settings.base import Count, Section


class AdvantageSettings(Section):
    """Does selection pay, on this stream, now? Its update is compared with one of as many samples, drawn uniformly, as
    samples of the target see it that had no say. With `draw: learned` and `auto` every probe compares, for nothing.
    """

    every_steps: Count | None = 32
    """Scored steps between comparisons; `null` for none. Each takes one pass over `target.refresh_samples` samples and
    two updates' gradients. There are none where a refresh takes the whole target: nobody is left to judge."""
    window: Annotated[int, Field(ge=4)] = 16
    """Comparisons that are remembered, and that are needed before anything is said."""
    pays_from: Annotated[float, Field(ge=1)] = 1.1
    """Selection pays while its updates are worth at least this many times uniform ones."""
    shadow_every: Count | None = None
    """Steps between measurements of what a step does to the loss on the samples of `target.held_back`, and what a step
    of as many samples, drawn uniformly from the same ones, would do. `null` for none. Each takes about five passes over
    what is held back and a plain step's time, memory for three gradients more, and memory of the host for the trained
    weights and their moments. `window` of them decide whether selection pays, in place of what is predicted."""
    when_not_paying: Literal["keep", "uniform"] = "keep"
    """What to do while selection does not pay: `keep` on, and say so; or train on `batch_size` samples drawn uniformly,
    plainly, and compare as often as before. With `draw: learned` set `draw: auto` instead."""
