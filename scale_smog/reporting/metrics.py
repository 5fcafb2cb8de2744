"""What a run says of itself: progress bar, metrics.jsonl, TensorBoard; rank 0 speaks."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from scale_smog import distributed
from scale_smog.data.augment import MEAN, STD
from scale_smog.reporting.health import StopBelow
from scale_smog.runtime import run_layout
from scale_smog.runtime.files import write_atomically

_MEAN, _STD = (torch.tensor(v / 255, dtype=torch.float32)[:, None, None] for v in (MEAN, STD))


class Metrics:
    """The writers of a run; on other ranks than 0 every method does nothing.

    Args:
        run_dir: folder of the run.
        step: finished steps; later lines of an interrupted run are cut.
        num_steps: of the whole run, for the ETA.
        global_batch: images of a step, for the ETA.
        stop_below: that figures should not stay below.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        num_steps: int,
        global_batch: int,
        stop_below: StopBelow | None = None,
    ):
        self._is_main = distributed.is_main()
        self._global_batch = global_batch
        self.stop_below = stop_below or StopBelow({}, patience=1)
        if not self._is_main:
            return
        from torch.utils.tensorboard import SummaryWriter  # of rank 0 only

        self._has_warned = False
        path = run_dir / run_layout.METRICS_FILE
        _cut_after(path, step)
        self._lines = open(path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / run_layout.BOARD_FOLDER), purge_step=step + 1)
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            initial=step, total=num_steps, unit="step", disable=not self._on_terminal, smoothing=0.1
        )

    def advance(self) -> None:
        """Moves the progress bar by a step."""
        if self._is_main:
            self._bar.update()

    def log(self, line: dict[str, float]) -> None:
        """Writes one logged step everywhere, the file finite values only; `line` holds `step`."""
        if not self._is_main:
            return
        self.stop_below.note(line)
        finite = {name: value for name, value in line.items() if math.isfinite(value)}
        with self._disk_may_be_full():
            self._lines.write(json.dumps(finite) + "\n")  # JSON knows no NaN
            self._lines.flush()
        with self._disk_may_be_full():
            for name, value in line.items():
                if name != "step":
                    self._board.add_scalar(name, value, line["step"])
        shown = {k: f"{line[k]:.4g}" for k in ("loss", "images_per_s") if k in line}
        shown["data_wait"] = f"{line.get('data_wait', 0):.0%}"
        self._bar.set_postfix(shown, refresh=False)
        if not self._on_terminal:
            groups = (
                f"groups {line['group_perplexity']:.0f}  " if "group_perplexity" in line else ""
            )
            images_left = (self._bar.total - line["step"]) * self._global_batch
            self.say(
                f"step {line['step']}/{self._bar.total}  loss {line['loss']:.4f} "
                f"(chance {line['chance_loss']:.2f})  {groups}"
                f"{line['images_per_s']:.0f} img/s  data wait {line['data_wait']:.0%}  "
                f"ETA {images_left / line['images_per_s']:.0f} s"
            )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes values that do not belong to every logged step to TensorBoard."""
        if self._is_main:
            self.stop_below.note({"step": step, **values})
            with self._disk_may_be_full():
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)

    def images(self, name: str, views: list[Tensor], num: int = 8) -> None:
        """Shows the first images of each kind of view [B, 3, H, W]: a row of what the nets see."""
        if not self._is_main:
            return
        from torchvision.utils import make_grid

        rows = [view[:num].cpu().float() * _STD + _MEAN for view in views]
        grids = [make_grid(row.clamp(0, 1), nrow=num) for row in rows]
        with self._disk_may_be_full():
            for i, grid in enumerate(grids):
                self._board.add_image(f"{name}/{i}", grid, 1)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Shows the distribution of `values`."""
        if self._is_main:
            with self._disk_may_be_full():
                self._board.add_histogram(name, values.cpu(), step)

    def say(self, text: str) -> None:
        """Prints a line without tearing the progress bar."""
        if self._is_main:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Closes all writers."""
        if self._is_main:
            self._bar.close()
            for writer in (self._board, self._lines):
                with self._disk_may_be_full():
                    writer.close()

    @contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        """Metrics that cannot be written end no run."""
        try:
            yield
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                self.say(f"warning: metrics are not written ({error.strerror}); training goes on")


def _cut_after(path: Path, step: int) -> None:
    """Drops a torn last line and the lines of steps that a resumed run will do again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError):
            break
        kept.append(line)
    write_atomically(path, "".join(kept).encode())
