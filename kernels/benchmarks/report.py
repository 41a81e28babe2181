"""What was measured, as JSON and as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from floor import floor_seconds, work
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
- copy: the time of a plain copy of the problem's least bytes, read and written, over the time, forward and
  forward + backward: the achieved fraction of copy bandwidth. The copy is measured in the same run.
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
    "copy",
    "error",
    "note",
)


TIMES = ("forward_ms", "forward_backward_ms")


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
    copy: tuple[Times, Times] | None = None  # of the least bytes of the forward pass, of both
    date: str = ""

    def copy_share(self, row: Row) -> tuple[float, float] | None:
        """The achieved fraction of copy bandwidth, of the forward pass and of both."""
        if not (self.copy and row.forward and row.both):
            return None
        return self.copy[0].median / row.forward.median, self.copy[1].median / row.both.median

    def copied_bytes(self) -> tuple[int, int]:
        """The least that the forward pass, and both, must read and write."""
        forward, backward = (work(self.entry, which).bytes for which in (False, True))
        return forward, forward + backward

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
    if result.copy:
        about += f"; {_copy(result.copy, result.copied_bytes())}"
    if result.date:
        about += f"; {result.date}"
    lines = [f"### {result.entry.name}", "", about, "", _table_row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    lines += [
        _table_row(_cells(row, ours if row is not ours else None, result.copy_share(row))) for row in rows
    ]
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
    found: dict[str, Any] = {
        "problem": asdict(entry) | {"dtype": str(entry.dtype).removeprefix("torch.")},
        "date": result.date,
    }
    if entry.device == "cuda":
        found["h200_floor_ms"] = _forward_and(result.floor_ms(), "backward")
    if result.copy:
        for name, times, moved in zip(TIMES, result.copy, result.copied_bytes(), strict=True):
            found |= {f"copy_{name}": asdict(times), f"copy_{name.replace('_ms', '_bytes')}": moved}
    rows = {row.name: _row_json(row, result.copy_share(row)) for row in result.ordered()}
    return found | {"implementations": rows}


def from_json(entry: Entry, found: dict[str, Any]) -> Result:
    """The way back of `as_json`."""
    copies = [_times(found.get(f"copy_{name}")) for name in TIMES]
    rows = [_row_from(name, row) for name, row in found["implementations"].items()]
    copy = (copies[0], copies[1]) if copies[0] and copies[1] else None
    return Result(entry, rows, copy, found.get("date", ""))


def _row_json(row: Row, copy_share: tuple[float, float] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"function": row.function, "error": row.error, "notes": row.notes}
    for name, times in zip(TIMES, (row.forward, row.both), strict=True):
        found[name] = None if times is None else asdict(times)
    if row.memory is not None:
        beyond = row.memory.beyond
        found |= {"tensor_bytes": row.memory.tensors, "peak_bytes": row.memory.peak, "beyond_bytes": beyond}
        found["beyond_share"] = beyond / row.memory.tensors
    if row.floor_share is not None:
        found["floor_share"] = _forward_and(row.floor_share, "forward_backward")
    if copy_share is not None:
        found["copy_share"] = _forward_and(copy_share, "forward_backward")
    return found


def _row_from(name: str, found: dict[str, Any]) -> Row:
    forward, both = (_times(found[key]) for key in TIMES)
    memory = Memory(found["tensor_bytes"], found["peak_bytes"]) if "peak_bytes" in found else None
    floor = found.get("floor_share")
    share = (floor["forward"], floor["forward_backward"]) if floor else None
    disagrees = any(note.startswith("disagrees") for note in found["notes"])
    return Row(
        name, found["function"], forward, both, memory, share, found["error"], disagrees, found["notes"]
    )


def _times(found: dict[str, Any] | None) -> Times | None:
    return Times(**found) if found else None


def _forward_and(values: tuple[float, float], second: str) -> dict[str, float]:
    return {"forward": values[0], second: values[1]}


def _cells(row: Row, ours: Row | None, copy_share: tuple[float, float] | None) -> list[str]:
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
        *(" / ".join(f"{s:.0%}" for s in share or ()) for share in (row.floor_share, copy_share)),
        "" if row.error is None else f"{row.error:.0e}",
        "; ".join(row.notes),
    ]


def _copy(times: tuple[Times, Times], moved: tuple[int, int]) -> str:
    """What the copy took, and its bandwidth."""
    rate = moved[1] / times[1].median / 1e6
    both = f"{_ms(times[0].median)} ms forward, {_ms(times[1].median)} ms forward + backward"
    return f"copy {both} at {rate:.3g} GB/s"


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
