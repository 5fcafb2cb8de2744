"""The methods that `learning.py` compares, each a backbone and what it does with a batch.

All train the same backbone on the same views at the same rates. Ours is the framework's own step.
The others are made of lightly's parts; `LightlySmog` is its SMoG example's loop, of which
`as_it_is` keeps the example's own settings too.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_smog.config import Recipe
from scale_smog.data.batch import Batch
from scale_smog.grouping import perplexity
from scale_smog.loop import train_step
from scale_smog.methods import METHODS as scale_smog_methods
from scale_smog.methods import GroupMethod
from scale_smog.methods.base import cosine_ema
from scale_smog.models import build_backbone
from scale_smog.schedules import ScheduledValues
from scale_smog.state import build_state

SIMCLR_TEMPERATURE = 0.2


class Contestant(ABC):
    """One method."""

    backbone: nn.Module

    @abstractmethod
    def step(self, batch: Batch, scheduled: ScheduledValues) -> Tensor:
        """Trains on a batch; returns the loss."""

    def figures(self) -> dict[str, float]:
        """What else it has to say at the end."""
        return {}


class Ours(Contestant):
    """The framework: `scale_smog.loop.train_step` on one rank, whichever its method.

    Args:
        recipe: of the run.
        batches: of the run, from its first.
        device: of the nets.
    """

    def __init__(
        self, recipe: Recipe, batches: Iterable[Batch], num_images: int, device: torch.device
    ):
        self._state = build_state(recipe, recipe.data.global_batch, device, num_images)
        if num_first := self._state.method.num_first_images:
            num_batches = -(-num_first // recipe.data.global_batch)
            self._state.method.start(islice(batches, num_batches))
        self.backbone = self._state.engine.online.backbone

    def step(self, batch: Batch, scheduled: ScheduledValues) -> Tensor:
        """One of training."""
        return train_step(self._state, batch, scheduled).loss.detach()

    def figures(self) -> dict[str, float]:
        """How many groups are in use, over the last steps."""
        if not isinstance(self._state.method, GroupMethod):
            return {}
        usage = self._state.method.usage.counts()
        return {"perplexity": perplexity(usage), "in_use": int((usage > 0).sum())}


class Peer(Contestant):
    """What the others share: heads, an optimizer that is torch's own, a momentum net if need be."""

    def __init__(self, recipe: Recipe, device: torch.device):
        torch.manual_seed(recipe.run.seed)
        model = recipe.model
        self.recipe, self.dim, self.hidden = recipe, model.dim, model.head_width
        self.backbone = build_backbone(model.backbone, model.width, model.small_images).to(device)
        self.num_features: int = self.backbone.num_features  # pyright: ignore
        self.num_steps = 0
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=recipe.engine.precision == "bf16"
        )
        self.device = device

    def prepare(self, *trained: nn.Module) -> None:
        """Moves heads to the device and hands all that is trained to an optimizer."""
        config = self.recipe.optimizer
        parameters = [
            p for net in (self.backbone, *trained) for p in net.to(self.device).parameters()
        ]
        decayed = [p for p in parameters if p.dim() > 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        if config.name == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1.0)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum)

    def update(self, loss: Tensor, lr: float) -> Tensor:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.num_steps += 1
        return loss.detach()


class LightlySimClr(Peer):
    """SimCLR of lightly's projection head and loss (Chen et al., ICML 2020)."""

    def __init__(
        self, recipe: Recipe, batches: Iterable[Batch], num_images: int, device: torch.device
    ):
        from lightly.loss import NTXentLoss  # pyright: ignore
        from lightly.models.modules import SimCLRProjectionHead  # pyright: ignore

        super().__init__(recipe, device)
        self.head = SimCLRProjectionHead(self.num_features, self.hidden, self.dim)
        self.loss = NTXentLoss(temperature=SIMCLR_TEMPERATURE)
        self.prepare(self.head)

    def step(self, batch: Batch, scheduled: ScheduledValues) -> Tensor:
        """Both views are trained."""
        with self.autocast:
            first, second = (self.head(self.backbone(view)) for view in batch.large)
        return self.update(self.loss(first.float(), second.float()), scheduled.lr)


class WithMomentumNet(Peer):
    """A backbone and a projection head, and copies that follow them."""

    def follow(self, head: nn.Module) -> None:
        """Copies of the nets as they are now."""
        self.head = head.to(self.device)
        self.copies = [
            copy.deepcopy(net).requires_grad_(False) for net in (self.backbone, self.head)
        ]

    def project(self, view: Tensor) -> Tensor:
        """The trained nets' projection [B, D]."""
        with self.autocast:
            return self.head(self.backbone(view)).float()

    @torch.no_grad()
    def update_copies(self, alpha: float) -> None:
        """Moves the copies towards the nets, alpha of themselves kept."""
        for net, its_copy in zip((self.backbone, self.head), self.copies, strict=True):
            leaders, followers = ([p.detach() for p in x.parameters()] for x in (net, its_copy))
            torch._foreach_lerp_(followers, leaders, 1 - alpha)

    @torch.no_grad()
    def project_momentum(self, view: Tensor) -> Tensor:
        """The copies' projection [B, D]."""
        with self.autocast:
            return self.copies[1](self.copies[0](view)).float()


class LightlyByol(WithMomentumNet):
    """BYOL of lightly's heads and loss (Grill et al., NeurIPS 2020)."""

    def __init__(
        self, recipe: Recipe, batches: Iterable[Batch], num_images: int, device: torch.device
    ):
        from lightly.loss import NegativeCosineSimilarity  # pyright: ignore
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead  # pyright: ignore

        super().__init__(recipe, device)
        self.follow(BYOLProjectionHead(self.num_features, self.hidden, self.dim))
        self.predictor = BYOLPredictionHead(self.dim, self.hidden, self.dim)
        self.loss = NegativeCosineSimilarity()
        self.prepare(self.head, self.predictor)

    def step(self, batch: Batch, scheduled: ScheduledValues) -> Tensor:
        """Each view predicts the other's projection."""
        targets = [self.project_momentum(view) for view in reversed(batch.large)]
        with self.autocast:
            predicted = [self.predictor(self.head(self.backbone(view))) for view in batch.large]
        pairs = zip(predicted, targets, strict=True)
        losses = [self.loss(mine.float(), target) for mine, target in pairs]
        # 2 - 2 cos of both views, as the paper has it; lightly's is the mean of -cos
        loss = self.update(4 + 2 * sum(losses, torch.zeros(())), scheduled.lr)
        self.update_copies(cosine_ema(self.recipe.model.ema, scheduled.progress))
        return loss


class LightlySwav(Peer):
    """SwAV of lightly's heads, prototypes and loss (Caron et al., NeurIPS 2020); no queue."""

    def __init__(
        self, recipe: Recipe, batches: Iterable[Batch], num_images: int, device: torch.device
    ):
        from lightly.loss import SwaVLoss  # pyright: ignore
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes  # pyright: ignore

        super().__init__(recipe, device)
        num_frozen = int(recipe.method.frozen_epochs * num_images) // recipe.data.global_batch
        self.head = SwaVProjectionHead(self.num_features, self.hidden, self.dim)
        self.prototypes = SwaVPrototypes(
            self.dim, recipe.grouping.num_groups, n_steps_frozen_prototypes=num_frozen
        )
        self.loss = SwaVLoss(recipe.grouping.temperature, sinkhorn_epsilon=recipe.method.epsilon)
        self.prepare(self.head, self.prototypes)

    def step(self, batch: Batch, scheduled: ScheduledValues) -> Tensor:
        """Both views are trained."""
        self.prototypes.normalize()
        with self.autocast:
            z = [self.head(self.backbone(view)) for view in batch.large]
        z = [F.normalize(each.float(), dim=1) for each in z]
        scores = [self.prototypes(each, self.num_steps) for each in z]
        return self.update(self.loss(scores, []), scheduled.lr)


class LightlySmog(WithMomentumNet):
    """lightly's SMoG: prototypes, heads, bank, and scikit-learn's k-means, as in its example."""

    rate: float | None = None  # constant; None: the schedule's

    def __init__(
        self, recipe: Recipe, batches: Iterable[Batch], num_images: int, device: torch.device
    ):
        from lightly.models.modules import SMoGPredictionHead, SMoGProjectionHead, SMoGPrototypes  # pyright: ignore
        from lightly.models.modules.memory_bank import MemoryBankModule  # pyright: ignore

        super().__init__(recipe, device)
        grouping = recipe.grouping
        self.follow(SMoGProjectionHead(self.num_features, self.hidden, self.dim))
        self.predictor = SMoGPredictionHead(self.dim, self.hidden, self.dim)
        groups = F.normalize(torch.rand(grouping.num_groups, self.dim))
        self.smog = SMoGPrototypes(group_features=groups, beta=0.99).to(device)
        rows = recipe.bank_steps * recipe.data.global_batch
        self.bank = MemoryBankModule(size=(rows, self.dim), feature_dim_first=False).to(device)
        self.counts = torch.zeros(40, grouping.num_groups, device=device)
        self.prepare(self.head, self.predictor)

    def step(self, batch: Batch, scheduled: ScheduledValues) -> Tensor:
        """One view is trained, towards the group of the other."""
        if self.num_steps > 0 and self.num_steps % self.recipe.grouping.reset_every == 0:
            self.reset()
        first, second = batch.views(swap=self.num_steps % 2 == 1)
        encoded = self.project(first)
        with self.autocast:
            predicted = self.predictor(encoded).float()
        self.update_copies(self.recipe.model.ema)
        ids = self.smog.assign_groups(self.project_momentum(second))
        groups = self.smog.get_updated_group_features(encoded)
        logits = self.smog(predicted, groups, temperature=self.recipe.grouping.temperature)
        self.smog.set_group_features(groups.detach())
        self.bank(encoded.detach(), update=True)
        own = self.smog.assign_groups(encoded)
        self.counts[self.num_steps % 40] = own.bincount(minlength=len(groups)).float()
        return self.update(F.cross_entropy(logits, ids), self.rate or scheduled.lr)

    def reset(self) -> None:
        """Groups by scikit-learn's k-means, momentum nets from the trained ones."""
        from sklearn.cluster import KMeans

        features = self.bank.bank.detach().cpu().numpy()
        kmeans: Any = KMeans(len(self.smog.group_features), n_init="auto").fit(features)
        centres = torch.from_numpy(kmeans.cluster_centers_).float()
        self.smog.set_group_features(F.normalize(centres, dim=1))
        self.follow(self.head)

    def figures(self) -> dict[str, float]:
        """How many groups are in use, over the last steps."""
        usage = self.counts.sum(0)
        return {"perplexity": perplexity(usage), "in_use": int((usage > 0).sum())}


class LightlySmogAsItIs(LightlySmog):
    """With the example's settings: 300 groups, a reset every 300 steps, alpha 0.99, SGD at 0.01."""

    def __init__(
        self, recipe: Recipe, batches: Iterable[Batch], num_images: int, device: torch.device
    ):
        changes = {
            "model": {"ema": 0.99, "head_width": 2048},
            "grouping": {"num_groups": 300, "reset_every": 300, "bank_steps": 300},
            "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-6},
        }
        parts = {name: getattr(recipe, name).model_copy(update=c) for name, c in changes.items()}
        super().__init__(recipe.model_copy(update=parts), batches, num_images, device)
        self.rate = 0.01


METHODS = {
    "ours": Ours,
    "lightly_smog": LightlySmog,
    "lightly_smog_as_it_is": LightlySmogAsItIs,
    "lightly_simclr": LightlySimClr,
    "lightly_byol": LightlyByol,
    "lightly_swav": LightlySwav,
    **dict.fromkeys(scale_smog_methods, Ours),
}
