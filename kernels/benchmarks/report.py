"""What was measured, as JSON and as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from floor import floor_seconds
from measure import Memory, Times
from peers import OURS
from shapes import Entry

LEGEND = """\
- forward: as in training, what the backward pass needs is kept. ms: median (20th to 80th percentile); on a
  GPU without a graph, so that small problems show the gaps between their launches.
- tensors: inputs, outputs and the gradients of both. peak: the most that is held at once in a forward and
  backward pass, tensors included. beyond: peak less tensors, also as a share of tensors.
- [n x]: n times the first row of the table.
- function: "same" computes all that the problem asks for; the others do less or something else.
- floor: the least time by bytes, products and exponentials (kernels/README.md) over the time, forward and
  forward + backward. Only for Triton on the GPU whose rates are known.
- error: norm of the difference from `eager` in twice the precision over the norm of that, the worst of output
  and gradients."""

COLUMNS = (
    "implementation",
    "function",
    "forward ms",
    "forward + backward ms",
    "peak MiB",
    "beyond MiB",
    "floor",
    "error",
    "note",
)


@dataclass
class Row:
    """One implementation on one entry; what could not be measured is None and has a note."""

    name: str
    function: str = ""
    forward: Times | None = None
    both: Times | None = None
    memory: Memory | None = None
    floor_share: tuple[float, float] | None = None  # of the forward pass, of both
    error: float | None = None
    disagrees: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass
class Result:
    """All rows of an entry."""

    entry: Entry
    rows: list[Row]

    def ordered(self) -> list[Row]:
        """Ours first, and of them the fastest."""
        return sorted(self.rows, key=lambda row: -OURS.index(row.name) if row.name in OURS else 1)

    def best_peer(self) -> Row | None:
        """The fastest implementation of the same function that is not ours, forward and backward."""
        timed = [r for r in self.rows if r.name not in OURS and r.function == "same" and r.both]
        return min(timed, key=_both_ms, default=None)

    def floor_ms(self) -> tuple[float, float]:
        """Of the forward pass and of the backward pass, on an H200."""
        return 1e3 * floor_seconds(self.entry, backward=False), 1e3 * floor_seconds(self.entry, backward=True)


def markdown(result: Result) -> str:
    """A heading and a table."""
    rows = result.ordered()
    ours = rows[0] if rows[0].name in OURS and rows[0].both else None
    about = str(result.entry)
    if ours and ours.memory:
        about += f"; tensors {_mib(ours.memory.tensors)} MiB"
    if any(row.floor_share for row in rows):
        forward, backward = result.floor_ms()
        about += f"; floor {_ms(forward)} ms forward, {_ms(backward)} ms backward"
    lines = [f"### {result.entry.name}", "", about, "", _table_row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    lines += [_table_row(_cells(row, ours if row is not ours else None)) for row in rows]
    if ours and (peer := result.best_peer()):
        lines += ["", _against(ours, peer)]
    return "\n".join(lines) + "\n"


def document(machine: dict[str, Any], results: Sequence[Result]) -> str:
    """The whole Markdown file."""
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    head = [f"# Attention operators on {machine['device']}", "", about, "", LEGEND, ""]
    return "\n".join([*head, *map(markdown, results)])


def as_json(result: Result) -> dict[str, Any]:
    """The same in plain numbers: milliseconds and bytes."""
    entry = result.entry
    found: dict[str, Any] = {"problem": asdict(entry) | {"dtype": str(entry.dtype).removeprefix("torch.")}}
    if entry.device == "cuda":
        found["h200_floor_ms"] = _forward_and(result.floor_ms(), "backward")
    return found | {"implementations": {row.name: _row_json(row) for row in result.ordered()}}


def _row_json(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"function": row.function, "error": row.error, "notes": row.notes}
    for name, times in (("forward_ms", row.forward), ("forward_backward_ms", row.both)):
        found[name] = None if times is None else asdict(times)
    if row.memory is not None:
        beyond = row.memory.beyond
        found |= {"tensor_bytes": row.memory.tensors, "peak_bytes": row.memory.peak, "beyond_bytes": beyond}
        found["beyond_share"] = beyond / row.memory.tensors
    if row.floor_share is not None:
        found["floor_share"] = _forward_and(row.floor_share, "forward_backward")
    return found


def _forward_and(values: tuple[float, float], second: str) -> dict[str, float]:
    return {"forward": values[0], second: values[1]}


def _cells(row: Row, ours: Row | None) -> list[str]:
    """A row of the table, set against ours."""
    cells = [row.name, row.function, *[""] * 4]
    for column, times, than in (
        (2, row.forward, ours and ours.forward),
        (3, row.both, ours and ours.both),
    ):
        if times:
            text = f"{_ms(times.median)} ({_ms(times.p20)} to {_ms(times.p80)})"
            cells[column] = text + (_ratio(times.median, than.median) if than else "")
    if memory := row.memory:
        other = ours and ours.memory
        cells[4] = _mib(memory.peak) + (_ratio(memory.peak, other.peak) if other else "")
        text = f"{_mib(memory.beyond)}, {memory.beyond / memory.tensors:.0%}"
        cells[5] = text + (_ratio(memory.beyond, other.beyond) if other else "")
    return [
        *cells,
        " / ".join(f"{share:.0%}" for share in row.floor_share or ()),
        "" if row.error is None else f"{row.error:.0e}",
        "; ".join(row.notes),
    ]


def _against(ours: Row, peer: Row) -> str:
    """A sentence on what the peer takes of what ours takes."""
    said = f"{_both_ms(peer) / _both_ms(ours):.2f} times the forward + backward time"
    if ours.memory and peer.memory:
        said += f", {peer.memory.peak / ours.memory.peak:.2f} times the peak"
        if ours.memory.beyond > 0:
            said += f", {peer.memory.beyond / ours.memory.beyond:.2f} times the memory beyond tensors"
    return f"Best peer of the same function: {peer.name}. It takes {said} of {ours.name}."


def _both_ms(row: Row) -> float:
    assert row.both is not None
    return row.both.median


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ratio(value: float, than: float) -> str:
    return f" [{value / than:.1f} x]" if than > 0 else ""


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f}" if count >= 100 * 2**20 else f"{count / 2**20:.3g}"
