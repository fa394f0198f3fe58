"""Our own step, the service's: `service.make_learner`, `service.make_draws` and `step.train_step`."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from statistics import fmean
from typing import Any

import torch
from gradient_selectors.preconditioner import plain
from gradient_selectors.views.interaction import Interaction

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
from stream_trainer.service import make_draws, make_learner
from stream_trainer.training.build import current_geometry
from stream_trainer.training.step import APPLIED, StepReport, score, train_step
from stream_trainer.training.target import mean_gradient

WARM_UP_STEPS = 2  # the second is the first under Adam's geometry


class Ours:
    """Steps of the service, as many at a time as contain one refresh of the target's gradient.

    With a bandit all candidates of a step come in and leave with it, but only those it draws get a gradient.
    """

    def __init__(self, workload: Workload, device: str, **selection: Any) -> None:
        """`selection`: settings of that section which the method stands for."""
        settings, loaded = build(workload, device, **selection)
        self._device = loaded.device
        self._targets = target_samples(workload)
        self.learner = make_learner(settings, loaded, self._targets)
        self._buffer = Buffer(settings.buffer)
        self._draws = make_draws(settings, self._buffer, loaded, self._targets)
        self._pools: Iterator[list[Sample]] = cycle(pools(workload))

    def warm_up(self) -> None:
        for _ in range(WARM_UP_STEPS):
            self._step()

    def _step(self) -> StepReport:
        for sample in next(self._pools):
            self._buffer.put(sample)
        report = train_step(self.learner, self._draws.pool(lambda: False))
        self._draws.settle(report.utilities)
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
            "mean_scored": fmean(len(report.candidates) for report in reports),
            "mean_chosen": fmean(len(report.chosen) for report in reports),
            "mean_positive": fmean(report.decision.num_positive or 0 for report in reports),
        }

    def answers(self) -> Answers:
        learner, capture = self.learner, self.learner.capture
        check_moments(learner.optimizer, capture.parameters)
        samples = next(self._pools)
        geometry = current_geometry(learner.optimizer, capture.parameters, learner.selection.settle_steps)
        target = mean_gradient(capture, self._targets[:CHECK_SAMPLES], learner.pad_id)
        gradients = capture.run(collate(samples[:CHECK_SAMPLES], learner.pad_id))
        interaction = Interaction(gradients, target, geometry)
        weighted = gradients.weighted_gradient(torch.tensor(CHECK_WEIGHTS))
        found = {
            "rows_N": interaction.rows_N,
            "plain_rows_N": replace(interaction, geometry=plain).rows_N,
            "gradient": flat(weighted, dict(capture.parameters)),
        }
        if learner.selection.weigh == "filter_then_weight":
            found["gram_NN"] = interaction.gram(range(CHECK_SAMPLES))
        if learner.selection.geometry != "exact":
            approximate = score(learner, samples, target)
            whole = Interaction(approximate.gradients, target, approximate.geometry)
            found["approximate_gram_NN"] = approximate.gram(range(CHECK_SAMPLES))
            found["approximate_rows_N"], found["exact_rows_N"] = approximate.rows_N, whole.rows_N
        return found
