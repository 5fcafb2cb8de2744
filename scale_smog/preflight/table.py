"""The table of a check: its rows, and values compared over hosts."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

H = TypeVar("H", bound=Hashable)


class Row(NamedTuple):
    """One check."""

    name: str
    summary: str  # what was found, where nothing is wrong
    faults: Sequence[str] = ()  # each names its host


def format_table(rows: Sequence[Row]) -> str:
    """A line a check, and a line for each fault."""
    lines = []
    for row in rows:
        said = [("FAULT", fault) for fault in row.faults] or [("ok", row.summary)]
        for number, (word, text) in enumerate(said):
            lines.append(f"{row.name if number == 0 else '':<14}{word:<7}{text}")
    return "\n".join(lines)


def most_common(values: Sequence[H]) -> H:
    """The value that occurs most often; where it is a draw, the first."""
    return Counter(values).most_common(1)[0][0]


def most_agreed(values: Sequence[float], tolerance: float) -> float:
    """The value that most others are within `tolerance` of; where it is a draw, the first."""
    ordered = sorted(values)

    def num_near(value: float) -> int:
        return bisect_right(ordered, value + tolerance) - bisect_left(ordered, value - tolerance)

    return max(values, key=num_near)


def by_host(per_rank: Sequence[Any], leaders: Sequence[int]) -> list[Any]:
    """Of every rank's value those of the hosts' first ranks."""
    return [per_rank[rank] for rank in leaders]
