"""Our own step, the service's: `build.make_engine`, `sampling.make_sampler` and `step.train_step` of `training`."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from statistics import fmean
from typing import Any

import torch
from gradient_selectors import Batch, Exact, Interaction
from gradient_selectors.capture.gradients import Gradient
from gradient_selectors.preconditioner import Preconditioner, plain, preconditioner_of
from gradient_selectors.target import mean_gradient
from torch import Tensor

from benchmarks.step_cost.methods.common import (
    CHECK_SAMPLES,
    CHECK_WEIGHTS,
    Answers,
    build,
    check_moments,
    flat,
    seconds_of,
)
from benchmarks.step_cost.workloads import REFRESH_STEPS, Workload, pools, target_samples
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.training.build import make_engine
from stream_trainer.training.draw.sampling import make_sampler
from stream_trainer.training.optimizer import make_optimizer
from stream_trainer.training.step import APPLIED, StepReport, train_step

WARM_UP_STEPS = 2  # the second is the first under Adam's preconditioner


class Ours:
    """Steps of the service, as many at a time as contain one refresh of the target's gradient.

    With a bandit all candidates of a step come in and leave with it, but only those it draws get a gradient.
    """

    def __init__(self, workload: Workload, device: str, **selection: Any) -> None:
        """`selection`: settings of that section which the method stands for."""
        self._settings, loaded = build(workload, device, **selection)
        self._device, self._pad_id = loaded.device, int(loaded.tokenizer.pad_token_id)
        self._targets = target_samples(workload)
        optimizer = make_optimizer(loaded.model, self._settings.optimizer, self._settings.selection)
        self.engine = make_engine(self._settings, loaded, optimizer, self._targets)
        self._buffer = Buffer(self._settings.buffer)
        self._sampler = make_sampler(self._settings, self._buffer, loaded, self.engine, self._targets)
        self._pools: Iterator[list[Sample]] = cycle(pools(workload))

    def warm_up(self) -> None:
        for _ in range(WARM_UP_STEPS):
            self._step()

    def _step(self) -> StepReport:
        for sample in next(self._pools):
            self._buffer.put(sample)
        pool = self._sampler.next(lambda: False)
        scores, optimizer = self._sampler.scores, self._settings.optimizer
        report = train_step(self.engine, pool, self._pad_id, optimizer, scores=scores)
        self._sampler.feedback(report)
        return report

    def repetition(self) -> dict[str, Any]:
        """Raises RuntimeError if a step made no update, or the steps did not contain one refresh: wrong work."""
        reports: list[StepReport] = []

        def steps() -> None:
            reports.extend(self._step() for _ in range(REFRESH_STEPS))

        seconds = seconds_of(steps, self._device) / REFRESH_STEPS
        results = {report.result for report in reports}
        refreshes = sum(report.target_refreshed for report in reports)
        if results != {APPLIED} or refreshes != 1:
            raise RuntimeError(f"{REFRESH_STEPS} steps came to {results} with {refreshes} refreshes, not to one")
        return {
            "seconds": seconds,
            "phases": {phase: fmean(report.seconds[phase] for report in reports) for phase in reports[0].seconds},
            "mean_scored": fmean(len(report.losses) for report in reports),
            "mean_selected": fmean(len(report.selected) for report in reports),
            "mean_positive": fmean(report.decision.num_positive or 0 for report in reports),
        }

    def answers(self) -> Answers:
        capture, selection = self.engine.capture, self._settings.selection
        check_moments(self.engine.optimizer, dict(capture.parameters))
        pool = next(self._pools)
        preconditioner = preconditioner_of(
            self.engine.optimizer, capture.parameters, selection.preconditioner_warmup_steps
        )
        target = mean_gradient(capture, [collate(self._targets[:CHECK_SAMPLES], self._pad_id)])
        gradients = capture.run(collate(pool[:CHECK_SAMPLES], self._pad_id))
        interaction = Interaction(gradients, target, preconditioner)
        found = {
            "utilities_N": interaction.utilities_N,
            "plain_utilities_N": replace(interaction, preconditioner=plain).utilities_N,
            "gradient": flat(gradients.weighted_gradient(torch.tensor(CHECK_WEIGHTS)), dict(capture.parameters)),
        }
        if selection.weigh == "filter_then_weight":
            found["gram_NN"] = interaction.gram(range(CHECK_SAMPLES))
        if selection.scoring != "exact":
            found |= self._approximate(collate(pool, self._pad_id), target, preconditioner)
        return found

    def _approximate(self, pool: Batch, target: Gradient, preconditioner: Preconditioner) -> dict[str, Tensor]:
        """What the engine's own scoring says: c of a whole pool, K of the check samples; and the exact c beside it."""
        scoring, capture = self.engine.scoring, self.engine.capture
        scoring.reset()
        gradients = capture.run(pool, scoring.start(target, preconditioner, capture.head))
        approximate = Interaction(gradients, target, preconditioner, scoring)
        return {
            "approximate_gram_NN": approximate.gram(range(CHECK_SAMPLES)),
            "approximate_utilities_N": approximate.utilities_N,
            "exact_utilities_N": replace(approximate, scoring=Exact()).utilities_N,
        }
