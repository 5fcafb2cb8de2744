"""What a run's folder tells of it, read by whoever draws it or sends it on; training writes it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_smog.config import Recipe
from scale_smog.errors import UserError
from scale_smog.recipe import load_recipe
from scale_smog.reporting import run_folder
from scale_smog.runtime import run_layout

RESET_TAG = "reset/drift"

Curve = tuple[Sequence[int], Sequence[float]]  # steps, values


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder has it, finished or not.

    Attributes:
        folder: of the run.
        recipe: that it is trained by.
        logged: lines of metrics.jsonl, oldest first.
        scalars: of TensorBoard and not in these lines, such as "knn" and "reset/drift".
        pictures: of TensorBoard, such as "views/0": PNG files.
        starts: where and when the run began and went on.
        results: evaluation -> figure -> value.
    """

    folder: Path
    recipe: Recipe
    logged: Sequence[Mapping[str, float]]
    scalars: Mapping[str, Curve]
    pictures: Mapping[str, bytes]
    starts: Sequence[Mapping[str, Any]]
    results: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Reads all of it.

        Raises:
            UserError: not the folder of a run.
        """
        if not (folder / run_layout.RECIPE_FILE).is_file():
            raise UserError(f"{folder} is not a run's folder: it has no {run_layout.RECIPE_FILE}")
        logged = read_lines(folder / run_layout.METRICS_FILE)
        events = BoardEvents(folder / run_layout.BOARD_FOLDER)
        events.reload()
        own = {name for line in logged for name in line}
        return cls(
            folder=folder,
            recipe=load_recipe(folder / run_layout.RECIPE_FILE),
            logged=logged,
            scalars={tag: events.curve(tag) for tag in events.scalar_tags if tag not in own},
            pictures=events.pictures(),
            starts=[x for x in read_lines(folder / run_layout.STARTS_FILE) if "ended" not in x],
            results=run_folder.read_results(folder),
        )

    def curve(self, name: str) -> Curve:
        """Steps and values of a figure, wherever it was logged; empty where it was not."""
        if name in self.scalars:
            return self.scalars[name]
        lines = [line for line in self.logged if name in line]
        return [int(line["step"]) for line in lines], [line[name] for line in lines]

    @property
    def reset_steps(self) -> Sequence[int]:
        """Steps at which k-means found the groups anew."""
        return self.curve(RESET_TAG)[0]


class BoardEvents:
    """A run's TensorBoard events; `reload` reads what has come since."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self._folder = folder
        self._events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1})

    def reload(self) -> None:
        """Reads on; nothing where a run has not begun to write them."""
        if self._folder.is_dir():
            self._events.Reload()

    @property
    def scalar_tags(self) -> Sequence[str]:
        """Names of what has a curve."""
        return self._events.Tags()["scalars"]

    def curve(self, tag: str) -> Curve:
        """Of each step the newest value, in the order of the steps."""
        points = {event.step: event.value for event in self._events.Scalars(tag)}
        return sorted(points), [points[step] for step in sorted(points)]

    def pictures(self) -> dict[str, bytes]:
        """The newest picture of each name."""
        tags = self._events.Tags()["images"]
        return {tag: self._events.Images(tag)[-1].encoded_image_string for tag in tags}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file up to one that is torn; none where there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
