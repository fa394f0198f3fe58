"""The progress of a run as people read it: a panel on a terminal, and the fields of a plain line."""

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stream_trainer.monitoring.progress import Loss, Now

WIDE = 132  # columns from which two stand side by side
LEAST_LINES, LEAST_WIDTH = 12, 60  # of a terminal that a panel fits on; one line on a smaller one
LONG_STEP_S = 5.0  # after which a step's seconds are shown
SHOWN_SETS, NAME_WIDTH = 4, 14

STYLES = {"training": "green", "catching_up": "green", "idle": "cyan", "failed": "bold red", "degraded": "yellow"}
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))

Row = tuple[str, Text]


def panel(now: Now, title: str, width: int, height: int) -> RenderableType:
    """The run in a panel that fits the terminal's size."""
    if width < LEAST_WIDTH or height < LEAST_LINES:
        line = Text("  ".join((now.state, *(f"{name} {value}" for name, value in _brief(now)))))
        line.truncate(max(1, width - 1), overflow="ellipsis")
        return line
    rows = _rows(now)
    heading = Text.assemble((now.state.replace("_", " "), STYLES.get(now.state, "bold")), f" · up {duration(now.up_s)}")
    body = _grid(rows)
    if width >= WIDE:
        body = Table.grid(padding=(0, 4), expand=True)
        half = (len(rows) + 1) // 2
        body.add_column(ratio=1)
        body.add_column(ratio=1)
        body.add_row(_grid(rows[:half]), _grid(rows[half:]))
    trouble = [_grid([("trouble", Text(now.trouble, "yellow"))])] if now.trouble else []
    return Panel(
        Group(body, *trouble), title=Text(title, "bold"), title_align="left", subtitle=heading, subtitle_align="right"
    )


def fields(now: Now) -> dict[str, object]:
    """What a plain line tells, by name; what is not known is left out. Seconds, nats per token, shares from 0 to 1."""
    found: dict[str, object] = {"state": now.state, "step": now.step, "steps_per_s": _short(now.steps_per_s)}
    found |= {"tokens_per_s": None if now.tokens_per_s is None else round(now.tokens_per_s), "lag": _whole(now.lag)}
    found["drain_s"] = _whole(now.drain_s)
    if now.pool is not None:
        found |= {"pool_loss": _short(now.pool.now), "pool_loss_at_start": _short(now.pool.start)}
    for name, loss in now.sets.items():
        found |= {f"{name}_loss": _short(loss.now), f"{name}_loss_at_start": _short(loss.start)}
    found |= {"chosen": _short(now.chosen), "gain": _short(now.gain)}
    found |= {"doing_s": round(now.doing_s, 1), "doing": now.doing, "trouble": now.trouble or None}
    return {name: value for name, value in found.items() if value is not None}


def duration(seconds: float) -> str:
    """For people: `12 s`, `4 min`, `1.5 h`, `3.2 d`."""
    for unit, name in _UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}" if name == "min" else f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def _rows(now: Now) -> list[Row]:
    doing = now.doing
    if now.doing_s >= LONG_STEP_S:
        doing += f", for {duration(now.doing_s)}"
    pull = "" if now.gain is None else f"{now.gain:.0%} of the pull last measured"
    rows = [
        ("now", Text(doing, "bold")),
        ("steps", _joined(_count(now.step), _rate(now.steps_per_s, "steps/s"), _rate(now.tokens_per_s, "tokens/s"))),
        ("stream", _joined(f"lag {_count(now.lag)}", f"drained in {_drained(now)}")),
        ("chosen", _joined(f"{_share(now.chosen)} of the pool", pull)),
        ("pool loss", _against_start(now.pool)),
    ]
    for name, loss in list(now.sets.items())[:SHOWN_SETS]:
        rows.append((f"{name} loss", _against_start(loss)))
    return rows


def _brief(now: Now) -> list[tuple[str, str]]:
    target = now.sets.get("target")
    rate = "–" if now.steps_per_s is None else f"{_number(now.steps_per_s)}/s"
    loss = "–" if target is None else f"{target.now:.3f}"
    return [("step", f"{_count(now.step)} {rate}"), ("lag", _count(now.lag)), ("target", loss), ("now", now.doing)]


def _grid(rows: Sequence[Row]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, overflow="ellipsis", max_width=NAME_WIDTH)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def _joined(*parts: str) -> Text:
    return Text("   ".join(part for part in parts if part))


def _against_start(loss: Loss | None) -> Text:
    if loss is None:
        return Text("–")
    change = loss.now - loss.start
    style = "green" if change < 0 else "" if change == 0 else "yellow"
    return Text.assemble(f"{loss.now:.3f}   at the start {loss.start:.3f}   ", (f"{change:+.3f}", style))


def _drained(now: Now) -> str:
    return "–" if now.drain_s is None else duration(now.drain_s)


def _rate(value: float | None, unit: str) -> str:
    return "" if value is None else f"{_number(value)} {unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.1f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _whole(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else round(value)
