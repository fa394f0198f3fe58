"""Every metric of the service, named and explained in one place, on a registry of its own.

Names follow Prometheus' conventions (`promtool check metrics` passes): base units, `_total` on counters, labels from
closed sets only. Children of labelled metrics are created at the start, for an alert on an absent series never fires.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stream_trainer.monitoring.groups.draws import DrawMetrics
from stream_trainer.monitoring.groups.moved import MovedMetrics
from stream_trainer.monitoring.groups.numbers import Numbers, Spread
from stream_trainer.monitoring.groups.ranks import RankMetrics
from stream_trainer.monitoring.groups.shadow import ShadowMetrics
from stream_trainer.monitoring.orders import ACTIONS
from stream_trainer.records import Outcome

PREFIX = "stream_trainer"

STEP_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
AGE_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 7 * 24 * 3600)
SOLVE_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)

PHASES = (
    *("wait", "target", "score", "weigh", "compare", "train", "update", "second_pass", "evaluate", "checkpoint"),
    *("shadow", "other"),
)
READING = ("wait", "decode", "hold", "commit", "other")
GPU_MEMORY = ("allocated", "reserved")
SAMPLE_NOTES = ("turn_without_loss", "control_tokens", "formatted_text", "truncated")
UNSELECTED = ("undrawn", "low_scored", "filtered", "duplicate")
EVENTS = (
    *("checkpoint_failed", "evaluation_failed", "paused", "resumed", "target_refused", "target_replaced", "rollback"),
    *("accused", "selection_pays", "selection_does_not_pay", "shadow_disagrees", "settings_changed"),
    *("published", "publish_gated", "publish_failed"),
)
WAYS = ("learned", "scored", "rival", "uniform")
STEP_RESULTS = ("applied", "skipped_nonfinite", "skipped_none_helps", "skipped_failed")
ORDER_RESULTS = ("done", "refused")
DEGRADED_CAUSES = ("checkpoint", "evaluation", "publish", "upload", "tracking", "target_reload")
PUBLISH_STAGES = ("version", "upload", "hub", "vllm", "command")
GATES = ("not_evaluated", "target_loss", "forgetting")
TRACKERS = ("tensorboard", "mlflow", "wandb", "otlp")
RESUME_KINDS = (
    *("model", "target", "selection", "optimizer", "training", "memory", "samples", "buffer"),
    *("source", "processor", "versions"),
)
SOLVER_STATUSES = ("optimal", "fallback_failed", "fallback_iterations", "fallback_equal")


class State(StrEnum):
    """What the service is doing."""

    STARTING = "starting"
    LOADING = "loading"
    CATCHING_UP = "catching_up"
    TRAINING = "training"
    IDLE = "idle"
    PAUSED = "paused"
    DRAINING = "draining"
    FAILED = "failed"


class _Outcomes(Collector):
    """Records by outcome, read from whoever counts them: nothing is counted twice."""

    def __init__(self) -> None:
        self.counts: Callable[[], Mapping[Outcome, int]] = dict

    def collect(self) -> Iterator[Metric]:
        text = "Records decided over the life of the model, by what became of them."
        family = CounterMetricFamily(f"{PREFIX}_records", text, labels=("outcome",))
        counts = self.counts()
        for outcome in Outcome:
            family.add_metric((outcome.value,), counts.get(outcome, 0))
        yield family


class Metrics:
    """All metrics of one service, on one registry.

    Attributes are prometheus_client objects; whoever observes something calls them directly.
    """

    def __init__(self, reasons: Iterable[str] = (), arms: int = 0) -> None:
        """`reasons`: the closed set of dead-letter reasons. `arms`: of the bandit that draws, if one does."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._stream()
        self._steps()
        self._selection()
        self._stages()
        self._durability()
        self._published()
        self._limits()
        for reason in reasons:
            self.dead_letters.labels(reason)
        for arm in range(arms):
            self.draws.arm_reward.labels(str(arm))
            self.draws.arm_draws.labels(str(arm))

    def durable(self, step: int, time: float, size: int) -> None:
        """Show the last checkpoint: its step, when it was written (Unix time), and its bytes."""
        self.checkpoint_step.set(step)
        self.checkpoint_time.set(time)
        self.checkpoint_bytes.set(size)

    def resumed_otherwise(self, names: Iterable[str]) -> None:
        """Show what has changed since the checkpoint was made; a name begins with its kind, `optimizer.eps`."""
        for name in names:
            self.resume_differences.labels(name.partition(".")[0]).inc()

    def in_force(self, settings_hash: str, since: float) -> None:
        """Show the settings by their hash, and since when they are in force (Unix time)."""
        self.settings.info({"hash": settings_hash})
        self.settings_changed.set(since)

    def happened(self, kind: str) -> None:
        """Note the time of an event of one of `EVENTS`."""
        self.last_event.labels(kind).set_to_current_time()

    def count_outcomes(self, counts: Callable[[], Mapping[Outcome, int]]) -> None:
        """Show these counts of decided records, which somebody else keeps."""
        self._outcomes.counts = counts

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _numbers(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Numbers:
        """A gauge that every step sets."""
        return Numbers(GaugeMetricFamily, f"{PREFIX}_{name}", text, labels, self.registry)

    def _sums(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Numbers:
        """A counter that every step counts."""
        return Numbers(CounterMetricFamily, f"{PREFIX}_{name}", text, labels, self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _stream(self) -> None:
        self.records_read = self._counter("records_read_total", "Records read from the stream.")
        self.bytes_read = self._counter("read_bytes_total", "Bytes of record values read from the stream.")
        self._outcomes = _Outcomes()
        self.registry.register(self._outcomes)
        self.dead_letters = self._counter(
            "dead_letters_total", "Records that could not be used, by reason.", ("reason",)
        )
        self.sample_notes = self._counter(
            "sample_notes_total", "Samples of which something is to be noted, and turns without loss.", ("note",)
        )
        for note in SAMPLE_NOTES:
            self.sample_notes.labels(note)
        self.dead_letters_held = self._gauge(
            "dead_letters_held", "Dead letters that could not be kept yet; their records are undecided."
        )
        self.unusable_ratio = self._gauge(
            "unusable_ratio", "Share of unusable records among the last ones read of each partition."
        )
        self.records_lost = self._counter(
            "records_lost_total", "Undecided records that were gone from the log and skipped."
        )
        self.lag = self._numbers(
            "lag_records", "Records (of a file: bytes) in the log behind the last decided one.", ("topic", "partition")
        )
        self.behind_transactions = self._numbers(
            "records_behind_open_transactions",
            "Records in the log that cannot be read before an open transaction ends.",
            ("topic", "partition"),
        )
        self.partitions_without_leader = self._gauge("partitions_without_leader", "Partitions that no broker serves.")
        self.passes = self._counter(
            "partitions_passed_over_total", "Times that a partition had nothing when its turn came, and was left out."
        )
        self.reachable = self._gauge("source_reachable", "0 while the stream cannot be read, its brokers being away.")
        self.paused = self._gauge("reading_paused", "1 while reading is paused because the buffer is full.")
        self.decided_offset = self._numbers(
            "decided_offset", "Offset below which every record is decided.", ("topic", "partition")
        )
        self.retention = self._gauge(
            "retention_seconds", "For how long the topic keeps its records; +Inf if for ever.", ("topic",)
        )
        self.retention_remaining = self._numbers(
            "retention_remaining_seconds",
            "Time until the oldest undecided record may be deleted by the topic's retention; +Inf if it never is.",
            ("topic", "partition"),
        )
        self.reading_seconds = self._counter(
            "reading_seconds_total", "Time of the thread that reads, by what it does.", ("activity",)
        )
        for activity in READING:
            self.reading_seconds.labels(activity)
        self.buffer_records = self._gauge("buffer_records", "Samples waiting to be trained on.")
        self.buffer_bytes = self._gauge("buffer_bytes", "Bytes of record values waiting.")
        self.buffer_tokens = self._gauge("buffer_tokens", "Tokens waiting.")
        name, text = f"{PREFIX}_sample_age_seconds", "Time from a record's timestamp to the step that decided it."
        self.sample_age = Spread(name, text, AGE_SECONDS, self.registry)

    def _steps(self) -> None:
        self.steps = self._sums("steps_total", "Steps, by result.", ("result",))
        for result in STEP_RESULTS:
            self.steps.set(0, result)
        self.steps_without_update = self._numbers("steps_without_update", "Steps in a row that changed no weight.")
        self.rollbacks = self._counter("rollbacks_total", "Times that training went back to the weights it had saved.")
        self.step_seconds = self._histogram(
            "step_seconds", "Time of one whole step, without the wait for its samples.", STEP_SECONDS
        )
        self.phase_seconds = self._sums("phase_seconds_total", "Time of the main thread, by phase.", ("phase",))
        for phase in PHASES:
            self.phase_seconds.set(0, phase)
        self.last_step = self._numbers("last_step_timestamp_seconds", "When the last step ended.")
        self.tokens_scored = self._sums("tokens_scored_total", "Tokens of scored candidates.")
        self.tokens_trained = self._sums("tokens_trained_total", "Tokens of samples that entered an update.")
        self.pieces = self._numbers("pool_pieces", "Passes in which the last pool was scored.")
        self.padding = self._numbers("padding_ratio", "Share of padding in the tokens of the last scored pool.")
        self.second_passes = self._sums(
            "second_pass_samples_total", "Selected samples whose gradients were computed again, for want of memory."
        )
        self.loss = self._numbers(
            "progressive_loss", "Mean loss of the last pool before training on any of it (nats per token)."
        )
        self.trained_loss = self._numbers("trained_loss", "Mean loss of the samples selected at the last step.")
        self.gradient_norm = self._numbers("gradient_norm", "Length of the last gradient before clipping.")
        self.learning_rate = self._numbers("learning_rate", "Learning rate of the last step.")
        self.evaluation_loss = self._gauge("evaluation_loss", "Mean loss on a fixed set (nats).", ("set",))
        self.evaluation_time = self._gauge(
            "evaluation_timestamp_seconds", "When a fixed set was last evaluated.", ("set",)
        )
        self.forgetting = self._gauge(
            "forgetting_ratio", "Loss on a fixed set over the first one measured, before it was trained.", ("set",)
        )
        self.moved = MovedMetrics(self._gauge)
        self.state = Enum(
            f"{PREFIX}_state",
            "What the service is doing.",
            states=[state.value for state in State],
            registry=self.registry,
        )
        self.orders = self._counter("orders_total", "Orders obeyed or refused.", ("action", "result"))
        for action in ACTIONS:
            for result in ORDER_RESULTS:
                self.orders.labels(action, result)
        self.build = Info(f"{PREFIX}_build", "Versions of what is running.", registry=self.registry)

    def _selection(self) -> None:
        self.selected_ratio = self._numbers("selected_ratio", "Share of the last pool that entered the update.")
        self.unselected = self._sums(
            "unselected_total", "Records that were not trained on, for no fault of theirs, by why.", ("why",)
        )
        for why in UNSELECTED:
            self.unselected.set(0, why)
        self.effective_samples = self._numbers(
            "effective_samples", "Effective sample size of the last coefficients, (sum w)^2 / sum w^2."
        )
        self.redundancy_ratio = self._numbers(
            "redundancy_ratio", "Share of the quadratic (redundancy) term in the last objective."
        )
        self.positive_ratio = self._numbers(
            "positive_ratio", "Share of the last pool whose update points towards the target."
        )
        self.solver_seconds = self._histogram(
            "solver_seconds", "Time of one solve of the quadratic program.", SOLVE_SECONDS
        )
        self.solver_runs = self._counter("solver_runs_total", "Solves, by how they ended.", ("status",))
        for status in SOLVER_STATUSES:
            self.solver_runs.labels(status)
        self.comparisons = self._counter("comparisons_total", "Comparisons of selection with a uniform draw.")
        self.selection_advantage = self._gauge(
            "selection_advantage", "What an update of selection is worth, in uniform ones; NaN before it is known."
        )
        self.selection_advantage.set(math.nan)
        self.shadow = ShadowMetrics(self._counter, self._gauge)
        self.pays = self._gauge("selection_pays", "0 while selection does not pay; 1 before it is known.")
        self.pays.set(1)
        self.target_agreement = self._gauge(
            "target_agreement_ratio", "How steady the target's gradient is: 1 without noise, 0 of noise alone."
        )
        self.target_topic = self._gauge(
            "target_topic_reachable", "0 while `target.topic` cannot be read; 1 also where there is none."
        )
        self.target_topic.set(1)
        self.target_refreshes = self._counter("target_refreshes_total", "Refreshes of the target gradient.")
        self.target_refusals = self._counter(
            "target_refreshes_refused_total", "Refreshes of the target gradient that were not finite and left out."
        )

    def _stages(self) -> None:
        """Of what draws, routes and masks. Layers are known once the model is loaded."""
        self.waiting_records = self._numbers("waiting_records", "Samples that wait to be drawn.")
        self.draws = DrawMetrics(self._counter, self._gauge, self._numbers)
        self.training_way = Enum(
            f"{PREFIX}_training_way", "What `draw: auto` has chosen.", states=list(WAYS), registry=self.registry
        )
        self.route_entropy = self._gauge(
            "route_entropy_ratio", "How undecided a layer's draw is: 0 for one sample, 1 for all alike.", ("layer",)
        )
        self.mask_density = self._gauge("mask_density_ratio", "Share of the trainable parameters that may move.")
        self.mask_churn = self._gauge("mask_churn_ratio", "Share of the mask that the last refresh put in.")
        self.mask_age = self._gauge("mask_age_steps", "Updates since the mask was chosen.")
        self.mask_refreshes = self._counter("mask_refreshes_total", "Refreshes of the mask.")

    def _durability(self) -> None:
        self.checkpoint_seconds = self._histogram("checkpoint_seconds", "Time to write one checkpoint.", STEP_SECONDS)
        self.checkpoint_stall_seconds = self._histogram(
            "checkpoint_stall_seconds", "Time in which no step was made for one checkpoint.", STEP_SECONDS
        )
        self.checkpoint_bytes = self._gauge("checkpoint_bytes", "Size of the last checkpoint.")
        self.checkpoint_step = self._gauge("checkpoint_step", "Step of the last checkpoint.")
        self.checkpoint_time = self._gauge("checkpoint_timestamp_seconds", "When the last checkpoint became durable.")
        self.checkpoint_failures = self._counter("checkpoint_failures_total", "Checkpoints that failed.")
        self.commit_failures = self._counter(
            "commit_failures_total", "Advisory offset commits that failed; nothing is lost by one."
        )
        self.degraded = self._gauge(
            "degraded", "1 while the service works on although something fails, by what fails.", ("cause",)
        )
        for cause in DEGRADED_CAUSES:
            self.degraded.labels(cause)
        self.resume_differences = self._gauge(
            "resume_differences",
            "Settings, contents and versions that the resumed checkpoint had other, by kind.",
            ("kind",),
        )
        for kind in RESUME_KINDS:
            self.resume_differences.labels(kind)
        self.settings = Info(f"{PREFIX}_settings", "The settings in force, by a hash of them.", registry=self.registry)
        self.settings_changed = self._gauge(
            "settings_changed_timestamp_seconds", "When settings, or contents that they name, last changed."
        )

    def _limits(self) -> None:
        """Of what ends a run, and of what happened to it."""
        self.disk_free = self._gauge("disk_free_bytes", "Bytes that may still be written where checkpoints lie.")
        self.memory_limit = self._gauge(
            "memory_limit_bytes", "Memory that the process may take: that of its container, or of the machine."
        )
        self.gpu_memory = self._gauge(
            "gpu_memory_bytes", "Memory of the GPU: used, and taken from the driver; 0 without one.", ("kind",)
        )
        for kind in GPU_MEMORY:
            self.gpu_memory.labels(kind)
        self.owner_epoch = self._gauge("owner_epoch", "How often the directory of checkpoints has had a new owner.")
        self.ranks = RankMetrics(self._counter, self._gauge)
        self.fenced = self._gauge("fenced", "1 once another trainer has taken over; this one is about to end.")
        self.last_event = self._gauge(
            "last_event_timestamp_seconds", "When something last happened, by kind; 0 before it has.", ("kind",)
        )
        for kind in EVENTS:
            self.last_event.labels(kind)

    def _published(self) -> None:
        """Of what goes out: published versions, uploads, trackers."""
        self.publish_step = self._gauge("publish_step", "Step of the newest published version.")
        self.publish_time = self._gauge("publish_timestamp_seconds", "When the newest version was published.")
        self.publish_seconds = self._histogram(
            "publish_seconds", "Time to make one version of a checkpoint, without its hooks.", STEP_SECONDS
        )
        self.publish_busy = self._gauge("publish_busy", "1 while a version is made or its hooks run.")
        self.publish_held = self._gauge("publish_held", "1 while `current` stays where somebody has put it.")
        self.publish_failures = self._counter("publish_failures_total", "Publishing that failed, by stage.", ("stage",))
        for stage in PUBLISH_STAGES:
            self.publish_failures.labels(stage)
        self.publish_gated = self._counter(
            "publish_gated_total", "Checkpoints that were held back from being published, by reason.", ("reason",)
        )
        for reason in GATES:
            self.publish_gated.labels(reason)
        self.checkpoint_upload_step = self._gauge("checkpoint_upload_step", "Step of the last uploaded checkpoint.")
        self.checkpoint_upload_failures = self._counter(
            "checkpoint_upload_failures_total", "Uploads of checkpoints that failed."
        )
        self.tracking_failures = self._counter(
            "tracking_failures_total", "Reports that a tracker refused, or that waited for it in vain.", ("tracker",)
        )
        for tracker in TRACKERS:
            self.tracking_failures.labels(tracker)
