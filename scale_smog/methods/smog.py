"""SMoG: synchronous momentum grouping (Pang et al., ECCV 2022)."""

from collections.abc import Iterable

from torch import Tensor

from scale_smog import loss as losses
from scale_smog.config import Recipe
from scale_smog.data.batch import Batch
from scale_smog.engine import Engine
from scale_smog.grouping import FeatureBank, MomentumGroups, ResetReport, chance_loss
from scale_smog.methods.base import GroupMethod, StepReport, first_features
from scale_smog.methods.simclr import contrast_images
from scale_smog.runtime import phases
from scale_smog.schedules import ScheduledValues, due


class Smog(GroupMethod):
    """Groups that move in step with the nets, and are found anew by k-means now and then."""

    title = "Synchronous Momentum Grouping, SMoG (Pang et al., ECCV 2022)"

    def __init__(self, recipe: Recipe, engine: Engine, batch: int, num_images: int):
        super().__init__(recipe, engine, batch, num_images)
        self.config, dim = recipe.grouping, recipe.model.dim
        groups = MomentumGroups.from_config(self.config, dim, recipe.run.seed)
        self.groups = groups.to(engine.device, engine.dtype)
        self.bank = FeatureBank(recipe.bank_steps, batch, dim, engine.device)
        self.parts |= {"groups": self.groups, "bank": self.bank}
        # After an instance-contrastive start they begin with what the net has learnt by then.
        if self.config.init == "kmeans" and not self.config.instance_warmup_steps:
            self.num_first_images = recipe.num_init_features

    def start(self, batches: Iterable[Batch]) -> None:
        """First groups: k-means over features of the initial net (section 4.1)."""
        z = [z for _, z in first_features(self.engine, batches)]  # [B, D] each
        bank = FeatureBank(len(z), len(z[0]), z[0].shape[1], z[0].device)
        for features in z:
            bank.push(features)
        self.groups.start_from(bank)

    def train_step(self, batch: Batch, scheduled: ScheduledValues, step: int) -> StepReport:
        """One step (sections 3.2 to 3.4)."""
        engine, groups = self.engine, self.groups
        if step < self.config.instance_warmup_steps:
            return self.instance_step(batch, scheduled)
        online_view, momentum_view = batch.views(swap=step % 2 == 1)
        reset = self.reset_if_due(step)

        z, p = engine.forward_online(online_view, batch.small)  # [B, D], [V, B, D]
        other_z = engine.forward_momentum(momentum_view)  # [B, D]
        target = groups.assign(other_z)  # [B]
        new_groups = groups.updated_by(z, scheduled.beta)  # [K, D], global batch, with grad
        loss = losses.group_contrastive_loss(p, new_groups, target, self.config.temperature)
        engine.backward(loss)
        is_applied = engine.step(scheduled.lr, scheduled.weight_decay)
        if is_applied:  # else a loss or a gradient was not finite: the step leaves nothing behind
            groups.commit(new_groups)
            self.bank.push(z)
            self.usage.push(groups.counts)
            engine.update_ema(self.recipe.model.ema)
        chance = chance_loss(self.config.num_groups)
        figures = {"beta": scheduled.beta}
        alignment = (z.detach() - other_z).square().sum(dim=1).mean()
        return StepReport(
            loss, is_applied, chance, figures, self.usage, reset, self.bank, alignment
        )

    def reset_if_due(self, step: int) -> ResetReport | None:
        """Groups by k-means over all ranks' cached features, momentum net from the online one."""
        report, is_first = None, step == self.config.instance_warmup_steps
        if step == 0 or not (is_first or due(step, self.config.reset_every)):
            return None
        if is_first:  # the groups of the initial net are of no use to a net that has learnt
            with phases.during(phases.KMEANS):
                self.groups.start_from(self.bank)
        elif self.config.kmeans:
            with phases.during(phases.KMEANS):
                report = self.groups.reseed_from(self.bank)
        if is_first or self.config.reset_momentum:
            self.engine.reset_momentum()
        return report

    def instance_step(self, batch: Batch, scheduled: ScheduledValues) -> StepReport:
        """A step of the instance-contrastive start: SimCLR's, and the groups rest.

        Not in the paper; docs/learning.md has its effect.
        """
        z, report = contrast_images(self.engine, batch, scheduled, self.recipe.method.temperature)
        if report.is_applied:
            self.bank.push(z)
            self.engine.update_ema(self.recipe.model.ema)
        return report._replace(figures={"beta": scheduled.beta})

    def centroids(self) -> Tensor:
        """The groups [K, D]."""
        return self.groups.centroids
