"""Sends a run's figures and pictures on, from its folder: training does not know of it.

A process of its own reads what training has written, so nothing of a server, a network or a library
can slow or stop a run. How far it has come is kept in the run's folder, and it goes on from there.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scale_smog.config import Recipe
from scale_smog.errors import UserError
from scale_smog.recipe import load_recipe
from scale_smog.reporting.run_record import BoardEvents, read_lines
from scale_smog.reporting.starts import has_ended
from scale_smog.reporting.trackers import TRACKERS, Point, Tracker
from scale_smog.runtime import run_layout
from scale_smog.runtime.files import write_atomically
from scale_smog.runtime.stores import shown

LINES_A_BATCH = 50
LONGEST_WAIT_S = 60.0


class Follower:
    """A run and a tracker, and what of the one the other has.

    Args:
        run_dir: the run's folder.
        kind: a key of `TRACKERS`.
        tracker: of that kind.
    """

    def __init__(self, run_dir: Path, kind: str, tracker: Tracker) -> None:
        if not (run_dir / run_layout.RECIPE_FILE).is_file():
            raise UserError(f"{run_dir} is not a run's folder: it has no {run_layout.RECIPE_FILE}")
        self._run_dir, self._tracker = run_dir, tracker
        self._path = run_dir / f"follow-{kind}.json"
        self._events = BoardEvents(run_dir / run_layout.BOARD_FOLDER)
        self._is_open = False
        kept = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._id: str | None = kept.get("id")
        self._steps: dict[str, int] = kept.get("steps", {})  # the last one that was sent
        self._pictures: dict[str, str] = kept.get("pictures", {})  # SHA-256 of what was sent

    def advance(self) -> None:
        """Sends what is new; what could not be sent is new again."""
        if not self._is_open:
            recipe = load_recipe(self._run_dir / run_layout.RECIPE_FILE)
            name = self._run_dir.resolve().name
            self._id = self._tracker.open(self._id, name, flat(recipe))
            self._is_open = True
            self._keep()
        lines = read_lines(self._run_dir / run_layout.METRICS_FILE)
        self._send(run_layout.METRICS_FILE, [_point(line) for line in lines])
        self._events.reload()
        logged = {name for line in lines for name in line}
        for tag in self._events.scalar_tags:
            if tag not in logged:
                curve = zip(*self._events.curve(tag), strict=True)
                self._send(tag, [Point(step, {tag: value}) for step, value in curve])
        self._send_pictures()

    def close(self) -> None:
        """Waits until the tracker has all of it."""
        if self._is_open:
            self._tracker.close()

    def _send(self, source: str, points: Sequence[Point]) -> None:
        sent = self._steps.get(source, -1)
        new = [point for point in points if point.step > sent]
        for start in range(0, len(new), LINES_A_BATCH):
            batch = new[start : start + LINES_A_BATCH]
            self._tracker.log(batch)
            self._steps[source] = batch[-1].step
            self._keep()

    def _send_pictures(self) -> None:
        pictures = self._events.pictures()
        pictures |= {path.stem: path.read_bytes() for path in self._run_dir.glob("*.png")}
        for name, png in pictures.items():
            digest = hashlib.sha256(png).hexdigest()
            if self._pictures.get(name) != digest:
                self._tracker.picture(name, max(self._steps.values(), default=0), png)
                self._pictures[name] = digest
                self._keep()

    def _keep(self) -> None:
        kept = {"id": self._id, "steps": self._steps, "pictures": self._pictures}
        write_atomically(self._path, json.dumps(kept, indent=1).encode())


def follow(
    run_dir: Path,
    kind: str,
    project: str,
    server: str = "",
    *,
    once: bool = False,
    every_s: float = 10.0,
    say: Callable[[str], None] = print,
) -> None:
    """Sends a run on until it has come to its end.

    Args:
        run_dir: the run's folder.
        kind: a key of `TRACKERS`.
        project: under which the tracker gathers runs.
        server: address or folder of the tracker; "": the library's own choice.
        once: send what there is and end.
        every_s: seconds from one look into the folder to the next.
        say: takes a line on a server that cannot be reached, and on one that can again.

    Raises:
        UserError: not a run's folder, a library is missing, or, with `once`, the server fails.
    """
    follower = Follower(run_dir, kind, TRACKERS[kind](project, server, run_dir))
    wait_s = every_s
    while True:
        is_last = once or has_ended(run_dir)  # asked first: what came since is sent too
        try:
            follower.advance()
            if wait_s > every_s:
                say(f"{kind} takes figures again")
            if is_last:
                return follower.close()
            wait_s = every_s
        except UserError:
            raise
        except Exception as error:  # the libraries' errors share no base class
            words = (str(error).splitlines() or [type(error).__name__])[0]
            if once:
                raise UserError(f"{kind} does not take the run's figures: {words}") from None
            if wait_s == every_s:
                say(f"{kind} does not take the run's figures ({words}); trying again")
            wait_s = min(2 * wait_s, max(LONGEST_WAIT_S, 2 * every_s))
        time.sleep(wait_s)


def flat(recipe: Recipe) -> dict[str, Any]:
    """A recipe's settings by their keys, such as "data.path"; secrets in URLs are left out."""
    sections = recipe.model_dump(mode="json").items()
    settings = {f"{section}.{key}": x for section, own in sections for key, x in own.items()}
    return {key: shown(x) if isinstance(x, str) else x for key, x in settings.items()}


def _point(line: dict[str, Any]) -> Point:
    return Point(int(line["step"]), {key: value for key, value in line.items() if key != "step"})
