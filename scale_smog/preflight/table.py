"""The table of a check: its rows, and values compared over hosts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


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


def most_common(values: Sequence[T], same: Callable[[T, T], bool] = lambda a, b: a == b) -> T:
    """The value that most others equal; where it is a draw, the first."""
    return max(values, key=lambda value: sum(same(value, other) for other in values))


def by_host(per_rank: Sequence[Any], leaders: Sequence[int]) -> list[Any]:
    """Of every rank's value those of the hosts' first ranks."""
    return [per_rank[rank] for rank in leaders]
