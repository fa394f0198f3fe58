"""How much memory a step takes over the model: plain training on the chosen samples, and ours on the whole pool.

    python -m benchmarks.memory --json memory.json [--ranks 2] [--tiny]

A small Llama with random weights, gradient checkpointing and Adam's moments; one sample in four is chosen. `plain` is
an ordinary loop on as many samples as are chosen, `chunked` the same with the head some positions at a time, as our
train steps have it. `whole` scores the pool at once and keeps every factor. `pieces` scores one piece after the other,
keeps c and K's rows, and runs the chosen samples again.

Each makes one step in a process of its own, under Adam's preconditioner and with a refresh of the target. Counted is
the process's peak over what it held with the model and its moments alone, so gradients and the target's gradient are in
it. Seconds are of the processor.

With `--ranks W` the model lies in rows on W processes (torch's FSDP2 over gloo, one thread each), which share the
samples, and `plain` is an ordinary FSDP2 loop. Bytes and seconds are those of the rank that took most.

Exit codes: 0 done, 1 a process has failed, 2 a mistake in the options.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.common.child import Child, EndedError
from benchmarks.common.reporting import OneLineParser, at_least_one, say, table, writable_file, write_result
from benchmarks.step_cost.workloads import MANDELBROT

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
MAPPED = "65536"  # bytes from which glibc gives freed memory back at once
CHOSEN = 4  # one sample in so many
SHORT = 8
PATIENCE = timedelta(minutes=10)
METHODS = ("plain", "chunked", "whole", "pieces")


@dataclass(frozen=True)
class Case:
    """A pool, and the model.

    Attributes:
        pool: samples N, all of `tokens` tokens.
        micro_tokens: of one piece.
        ranks: processes that share the model; 1 for a whole one.
    """

    pool: int
    tokens: int
    layers: int = 8
    width: int = 256
    vocabulary: int = 8192
    micro_tokens: int = 4096
    ranks: int = 1

    @property
    def name(self) -> str:
        return f"{self.pool} x {self.tokens:,}"


CASES = (Case(4, 4096), Case(16, 2048))
IN_ROWS = (Case(16, 1024, micro_tokens=2048),)  # a piece is what plain training's pass takes on two ranks
TINY = Case(4, 24, layers=2, width=80, vocabulary=320, micro_tokens=48)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("python -m benchmarks.memory", description=__doc__, formatter_class=form)
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="where the result is written")
    parser.add_argument("--tiny", action="store_true", help="a very small model and pool: does it run at all?")
    parser.add_argument("--ranks", type=at_least_one, default=1, metavar="W", help="processes that share a model (1)")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(Case(**json.loads(options.one[0])), options.one[1])))
        return 0
    if options.json is None:
        parser.error("the following arguments are required: --json")
    cases = CASES if options.ranks == 1 else IN_ROWS
    if options.tiny:
        cases = (replace(TINY, pool=CHOSEN * options.ranks),)
    if options.ranks > min(case.pool // CHOSEN for case in cases):
        parser.error("argument --ranks: each rank trains plainly on one sample or more, and 4 are chosen; set it to 4")
    try:
        summary = [row(replace(case, ranks=options.ranks)) for case in cases]
    except EndedError as error:
        say(f"error: a process {error}")
        return 1
    write_result(options.json, {"versions": _versions(), "summary": summary})
    print(report(summary))
    return 0


def row(case: Case) -> dict[str, Any]:
    """What each method took, in processes of their own, and the ratio of ours to plain training."""
    found = {}
    for method in METHODS:
        say(f"{case.name}: {method}")
        found[method] = _together(_on_ranks(case, method))
    over = {f"{method}_over_plain": found[method]["bytes"] / found["plain"]["bytes"] for method in METHODS[1:]}
    return {"case": case.name, "ranks": case.ranks, "chosen": case.pool // CHOSEN, **found, **over}


def _on_ranks(case: Case, method: str) -> list[dict[str, Any]]:
    """What each rank says, a process of its own. Raises EndedError if one fails."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", json.dumps(asdict(case)), method]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": MAPPED}
    with ExitStack() as up, tempfile.TemporaryDirectory(prefix="memory-") as folder:
        if case.ranks > 1:
            environment |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(case.ranks), "MEETING": f"{folder}/meeting"}
        ranks = []
        for rank in range(case.ranks):
            ranks.append(Child(command, environment | {"RANK": str(rank)}))
            up.callback(ranks[-1].close)
        return [rank.receive() for rank in ranks]


def _together(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One answer of all ranks: the most that any took, and all samples that were run again."""
    found = dict(ranks[0])
    found |= {name: max(rank[name] for rank in ranks) for name in ("bytes", "seconds")}
    if "second_pass_samples" in found:
        found["second_pass_samples"] = sum(rank["second_pass_samples"] for rank in ranks)
    return found


def measure(case: Case, method: str) -> dict[str, Any]:
    """Bytes over the model and its moments, and seconds of the processor, of this rank."""
    import torch

    from benchmarks.step_cost.methods.common import check_moments

    world, model = _world(case), _model(case)
    attached = model if case.ranks == 1 else _in_rows(model, world, is_plain=method == "plain")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    check_moments(optimizer, dict(model.named_parameters()))
    ids_NT = _tokens(case, case.pool, seed=0)
    _plain(model, ids_NT[:, :SHORT])  # what libraries load at first use is not the step's
    optimizer.zero_grad(set_to_none=True)
    rest = _held()
    step = _step(method, case, attached, optimizer, world)
    _forget_peak()
    started = time.process_time()
    details = step(ids_NT)
    optimizer.step()
    found = {"bytes": _peak() - rest, "seconds": time.process_time() - started, **details}
    world.facts([0])  # nobody leaves while another may still wait for him
    return found


def _world(case: Case) -> Any:
    from gradient_selectors.world.base import Alone

    if case.ranks == 1:
        return Alone()
    import torch.distributed as dist
    from gradient_selectors.world.ranks import Ranks

    rank, meeting = int(os.environ["RANK"]), f"file://{os.environ['MEETING']}"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=case.ranks, timeout=PATIENCE)
    return Ranks(PATIENCE)


def _in_rows(model: Any, world: Any, *, is_plain: bool) -> Any:
    """What a step is made with, once the model is cut: itself, as any FSDP2 loop has it, or our capture of it."""
    from gradient_selectors import GradientCapture
    from gradient_selectors.sharding import blocks_of, shard
    from torch.distributed.fsdp import fully_shard

    if is_plain:
        for part in (*blocks_of(model), model):
            fully_shard(part)
        return model
    capture = GradientCapture(model)
    shard(capture, world)
    return capture


def _model(case: Case) -> Any:
    from stream_trainer.models.loading import load_model
    from stream_trainer.settings.schema import ModelSettings

    config = {
        "model_type": "llama",
        "vocab_size": case.vocabulary,
        "hidden_size": case.width,
        "intermediate_size": case.width * 11 // 4,
        "num_hidden_layers": case.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": case.tokens,
    }
    settings = ModelSettings(config=config, tokenizer="bytes", gradient_checkpointing=True)
    return load_model(settings, seed=0).model


def _step(method: str, case: Case, model: Any, optimizer: Any, world: Any) -> Callable[[Any], Mapping[str, Any]]:
    """What takes the place of `loss.backward()`."""
    from gradient_selectors import Equal, FilterThenWeight, SelectionEngine, Sketched

    chosen = case.pool // CHOSEN
    if method == "plain":
        return lambda ids_NT: _plain(model, ids_NT[world.rank : chosen : world.size])
    if method == "chunked":
        trainer = SelectionEngine(model, optimizer, Equal(), world=world)
        return lambda ids_NT: _ours(trainer, ids_NT[:chosen])
    in_pieces = method == "pieces"
    engine = SelectionEngine(
        model,
        optimizer,
        FilterThenWeight(chosen),
        target=[_batch(_tokens(case, chosen, seed=1))],
        scoring=Sketched(),
        micro_tokens=case.micro_tokens if in_pieces else None,
        factors_bytes=0 if in_pieces else None,
        world=world,
    )
    return lambda ids_NT: _ours(engine, ids_NT)


def _plain(model: Any, ids_NT: Any) -> dict[str, Any]:
    model(input_ids=ids_NT, labels=ids_NT, use_cache=False).loss.backward()
    return {}


def _ours(engine: Any, ids_NT: Any) -> dict[str, Any]:
    decision = engine.backward(_batch(ids_NT))
    found = engine.last
    return {
        "selected": len(decision.selected),
        "pieces": found.pieces,
        "second_pass_samples": found.second_pass_samples,
        "phases": dict(found.seconds),
    }


def _batch(ids_NT: Any) -> dict[str, Any]:
    return {"input_ids": ids_NT, "labels": ids_NT}


def _tokens(case: Case, count: int, seed: int) -> Any:
    """Token ids (count, T) of a Zipf law, as words follow it: gradients of samples then have something in common."""
    import torch

    shares_V = 1 / (torch.arange(case.vocabulary) + MANDELBROT)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(shares_V, count * case.tokens, replacement=True, generator=generator).view(count, -1)


def report(summary: Sequence[Mapping[str, Any]]) -> str:
    """What people read at the end."""
    rows = [
        (
            f"{found['case']}, {found['chosen']} chosen" + (f", {found['ranks']} ranks" if found["ranks"] > 1 else ""),
            method,
            f"{found[method]['bytes'] / 1e6:.0f}",
            f"{found[method]['bytes'] / found['plain']['bytes']:.2f}",
            f"{found[method]['seconds']:.1f}",
        )
        for found in summary
        for method in METHODS
    ]
    return table(("pool", "method", "MB over the model", "over plain", "processor seconds"), rows)


def _held() -> int:
    """Bytes that this process holds now."""
    return _status("VmRSS") if STATUS.exists() else _peak()


def _forget_peak() -> None:
    if CLEAR.exists():
        CLEAR.write_text(RESET_PEAK)


def _peak() -> int:
    """The most bytes that this process has held."""
    if STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")}


if __name__ == "__main__":
    sys.exit(main())
