"""What a rank reports of its steps: speed, loss, usage of the groups, and what is wrong."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from scale_smog import distributed
from scale_smog.config import Recipe
from scale_smog.data.batch import Batch
from scale_smog.errors import RankError, RunEnded, UserError
from scale_smog.grouping import perplexity
from scale_smog.grouping.quality import effective_rank, effective_rank_of_few, uniformity
from scale_smog.methods import StepReport
from scale_smog.reporting.health import SkippedSteps, collapse_warning
from scale_smog.reporting.metrics import Metrics
from scale_smog.reporting.stragglers import Stragglers
from scale_smog.schedules import ScheduledValues, due

# Of one step, over all ranks; their eigenvalues take a millisecond, those of 256 take ten.
RANKED_IMAGES = 192


class StepClock:
    """Wall time since the last report, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts a new report."""
        self._start = time.perf_counter()
        self._waited_s = 0.0
        self._num_steps = 0

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time it takes counts as waiting."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited_s += time.perf_counter() - start
        self._num_steps += 1
        return batch

    def report(self, global_batch: int) -> dict[str, float]:
        """Images a second over all ranks, and the share of the time spent waiting; restarts."""
        elapsed = time.perf_counter() - self._start
        speed = self._num_steps * global_batch / elapsed
        share = self._waited_s / elapsed
        self.restart()
        return {"images_per_s": speed, "data_wait": share}


class Progress:
    """Follows the loop step by step, on every rank.

    Args:
        recipe: of the run.
        metrics: where rank 0 writes.
        num_steps: of the whole run.
        device: of this rank.
    """

    def __init__(self, recipe: Recipe, metrics: Metrics, num_steps: int, device: torch.device):
        self.metrics = metrics
        self.clock = StepClock()
        self._recipe, self._num_steps = recipe, num_steps
        self._skipped, self._stragglers = SkippedSteps(recipe.run), Stragglers(device)

    def restart(self) -> None:
        """Leaves out of what is measured whatever was no step."""
        self.clock.restart()
        self._stragglers.restart()

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The loader's next batch.

        Raises:
            RankError: this rank's loader fails; the others wait for it in the step.
        """
        try:
            return self.clock.next(batches)
        except UserError as error:
            raise RankError(
                f"{distributed.rank_and_host()}: {error}; when the data is there again, the same "
                "command goes on from the newest checkpoint"
            ) from error

    def after_step(
        self,
        step: int,
        batch: Batch,
        report: StepReport,
        scheduled: ScheduledValues,
        features: Tensor,
    ) -> None:
        """Reports the step just finished; a collective at every `run.log_every`.

        Args:
            step: finished steps.
            batch: that was trained on.
            report: of the method.
            scheduled: rates of the step.
            features: of the backbone [B, F], of this rank's images.

        Raises:
            RunEnded: too many steps in a row were not finite, or a figure stays too low.
        """
        metrics = self.metrics
        if report.reset:
            values = {f"reset/{name}": value for name, value in vars(report.reset).items()}
            metrics.scalars(step, values)
        if step == 1:
            metrics.images("views", [*batch.large, *batch.small])
        metrics.advance()
        self._skipped.note(step, report.is_applied, report.loss, batch, metrics.say)
        if due(step, self._recipe.run.log_every) or step in (1, self._num_steps):
            self._log(step, report, scheduled, features)

    def _log(
        self, step: int, report: StepReport, scheduled: ScheduledValues, features: Tensor
    ) -> None:
        """A step that was left out has been reported already."""
        speed = self.clock.report(self._recipe.data.global_batch)
        if warning := self._stragglers.found(speed["data_wait"]):
            self.metrics.say(f"warning: {warning}")
        if not report.is_applied:
            return
        loss = distributed.all_reduce(report.loss.detach().clone()) / distributed.world_size()
        figures = {
            "step": step,
            "epoch": scheduled.epoch,
            "loss": loss.item(),
            "chance_loss": report.chance_loss,
            "lr": scheduled.lr,
            **report.figures,
            **_quality_figures(report, features),
            **speed,
        }
        counts = report.usage.counts() if report.usage else None
        self.metrics.log(figures if counts is None else figures | _usage_figures(counts))
        if counts is not None:
            self._report_usage(step, counts)
        self._stop_if_low()

    def _stop_if_low(self) -> None:
        """Ends the run, on all ranks, where a figure has been below `run.stop_below` for long."""
        if self._recipe.run.stop_below:
            if problem := distributed.broadcast_object(self.metrics.stop_below.problem):
                raise RunEnded(problem)

    def _report_usage(self, step: int, counts: Tensor) -> None:
        self.metrics.histogram(step, "group_usage", counts)
        if warning := collapse_warning(counts):
            self.metrics.say(f"warning: {warning}")


def _quality_figures(report: StepReport, features: Tensor) -> dict[str, float]:
    """Quality of features without labels, of rank 0; a collective."""
    figures = {"rankme_features": effective_rank_of_few(features, RANKED_IMAGES)}
    if report.bank:
        rows = report.bank.features()  # [N, D]
        figures["rankme_bank"] = effective_rank(rows)
        figures["uniformity"] = uniformity(rows).item()
    if report.alignment is not None:
        alignment = distributed.all_reduce(report.alignment) / distributed.world_size()
        figures["alignment"] = alignment.item()
    return figures


def _usage_figures(counts: Tensor) -> dict[str, float]:
    """Of the groups' usage [K]."""
    return {
        "groups_in_use": int((counts > 0).sum()),
        "group_perplexity": perplexity(counts),
        "largest_group_share": (counts.max() / counts.sum()).item(),
    }
