"""The two nets: the online net is trained, the momentum net follows it."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_smog.config import DEFAULT_NETS, ModelConfig, NetPlan
from scale_smog.models import heads
from scale_smog.models.backbones import build_backbone, stages
from scale_smog.models.drop_path import drop_paths, dropped

# Shapes: B images per rank, F size of the backbone's features, D of the projections,
# V = 1 + n views of the online net, L residual branches with drop path.


def unit(x: Tensor) -> Tensor:
    """Rows of x at length 1, in float32 at least: similarities and group sums need the digits."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class OnlineNet(nn.Module):
    """Backbone, projector and predictor (SMoG section 3.1); only this net is trained."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor
        self.drop_paths = drop_paths(backbone)

    def forward(
        self, view: Tensor, others: Sequence[Tensor] = (), factors: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projects one view, which feeds the groups, and predicts from every view.

        Args:
            view: The first view [B, 3, H, W].
            others: n more views, each [B, 3, h, w]; those of one size in a row pass through the
                net together.
            factors: Of drop path [L, V, B]; None: nothing is dropped.

        Returns:
            z [B, D], the unit projections of the first view, and p [V, B, D], the unit predictions
            of the first view (`p[0]`) and of the others in order; both at least float32. And
            the backbone's features [B, F] of the first view, without gradient.
        """
        features = self._backbone(view, factors, slice(1))  # [B, F]
        projected = self.projector(features)  # [B, D]
        predicted = [self._predict(projected).unsqueeze(0)]  # [1, B, D]
        first = 1
        for _, group in groupby(others, key=lambda x: x.shape[2:]):
            alike = list(group)
            predicted.append(self._predict_together(alike, factors, first))
            first += len(alike)
        return unit(projected), torch.cat(predicted), features.detach()

    def features(self, view: Tensor) -> Tensor:
        """The backbone's features [B, F] of a view [B, 3, H, W], for evaluation."""
        return self.backbone(view)

    def _predict(self, projected: Tensor) -> Tensor:
        return unit(self.predictor(projected))

    def _predict_together(
        self, views: Sequence[Tensor], factors: Tensor | None, first: int
    ) -> Tensor:
        images = torch.cat(list(views))  # [n·B, 3, h, w]
        features = self._backbone(images, factors, slice(first, first + len(views)))
        predicted = self._predict(self.projector(features))  # [n·B, D]
        return predicted.unflatten(0, (len(views), -1))  # [n, B, D]

    def _backbone(self, images: Tensor, factors: Tensor | None, views: slice) -> Tensor:
        """Features [n·B, F] of the images of some of the views [n·B, 3, h, w]."""
        if factors is None:
            return self.backbone(images)
        with dropped(self.drop_paths, factors[:, views].flatten(1).unbind()):
            return self.backbone(images)


class PrototypeNet(OnlineNet):
    """An online net with prototypes in the predictor's place (SwAV section 3.1).

    Its predictions p [V, B, K + D] are similarities with the K prototypes, then unit projections.
    """

    def _predict(self, projected: Tensor) -> Tensor:
        z = unit(projected)  # [B, D]
        return torch.cat([self.predictor(z), z], dim=-1)


class MomentumNet(nn.Module):
    """Backbone and projector without gradients, named as in `OnlineNet` (SMoG section 3.1).

    It stays in training mode: like the online net, it normalises by the statistics of its batch.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.requires_grad_(False)

    def forward(self, view: Tensor) -> Tensor:
        """Maps one large view [B, 3, H, W] to its unit projections z' [B, D], at least float32."""
        return unit(self.projector(self.backbone(view)))

    def features(self, view: Tensor) -> Tensor:
        """The backbone's features [B, F] of a view [B, 3, H, W], for evaluation."""
        return self.backbone(view)


def sharding_units(net: OnlineNet | MomentumNet) -> list[nn.Module]:
    """The parts of a net to be sharded one by one, in order; they hold all of its parameters."""
    units = [*stages(net.backbone), net.backbone, net.projector]
    if isinstance(net, OnlineNet):
        units.append(net.predictor)
    return list(dict.fromkeys(units))


def build_nets(model: ModelConfig, plan: NetPlan = DEFAULT_NETS) -> tuple[OnlineNet, MomentumNet]:
    """Builds the online net with random weights and the momentum net as its copy.

    Raises:
        UserError: There is no such backbone.
    """
    backbone = build_backbone(model.backbone, model.width, model.small_images, model.drop_path)
    return build_nets_around(backbone, model, plan, heads.head_activation(backbone))


def build_nets_around(
    backbone: nn.Module, model: ModelConfig, plan: NetPlan, activation: type[nn.Module]
) -> tuple[OnlineNet, MomentumNet]:
    """As `build_nets`, with a backbone that is there.

    A method without momentum net gets one that holds nothing, which is not called.
    """
    num_features: int = backbone.num_features  # pyright: ignore[reportAssignmentType]
    dim, width = model.dim, model.head_width
    projector = heads.projector(num_features, width, dim, activation, plan.is_projection_normed)
    online = OnlineNet(backbone, projector, nn.Identity())
    if plan.predictor == "prototypes":
        online = PrototypeNet(backbone, projector, heads.Prototypes(plan.num_prototypes, dim))
    elif plan.predictor != "none":
        is_normed = plan.predictor == "normed mlp"
        online.predictor = predictor = heads.predictor(dim, width, activation, is_normed)
        if model.identity_predictor:
            heads.start_as_identity(predictor)
    if not plan.num_momentum_views:
        return online, MomentumNet(nn.Identity(), nn.Identity())
    return online, MomentumNet(deepcopy(online.backbone), deepcopy(online.projector))
