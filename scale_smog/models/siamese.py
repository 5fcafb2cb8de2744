"""The two nets of SMoG: the online net is trained, the momentum net follows it."""

from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_smog.config import ModelConfig
from scale_smog.models import heads
from scale_smog.models.backbones import build_backbone

# Shapes: B images per rank, F size of the backbone's features, D of the projections, n small views,
# V = 1 + n views of the online net.


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

    def forward(self, large: Tensor, small: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Projects the large view, which feeds the groups, and predicts from every view.

        Args:
            large: The large view [B, 3, H, W].
            small: The n small views, each [B, 3, h, w]; they pass through the net together.

        Returns:
            z [B, D], the unit projections of the large view, and p [V, B, D], the unit predictions
            of the large view (`p[0]`) and of the small views in order; both at least float32. And
            the backbone's features [B, F] of the large view, without gradient.
        """
        features = self.backbone(large)  # [B, F]
        projected = self.projector(features)  # [B, D]
        predicted = self.predictor(projected).unsqueeze(0)  # [1, B, D]
        if small:
            predicted = torch.cat([predicted, self._predict_small(small)])  # [V, B, D]
        return unit(projected), unit(predicted), features.detach()

    def features(self, view: Tensor) -> Tensor:
        """The backbone's features [B, F] of a view [B, 3, H, W], for evaluation."""
        return self.backbone(view)

    def _predict_small(self, small: Sequence[Tensor]) -> Tensor:
        images = torch.cat(list(small))  # [n·B, 3, h, w]
        predicted = self.predictor(self.projector(self.backbone(images)))  # [n·B, D]
        return predicted.unflatten(0, (len(small), -1))  # [n, B, D]


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


def build_nets(model: ModelConfig) -> tuple[OnlineNet, MomentumNet]:
    """Builds the online net with random weights and the momentum net as its copy.

    Raises:
        UserError: There is no such backbone.
    """
    net = build_backbone(model.backbone, model.width, model.small_images)
    num_features: int = net.num_features  # pyright: ignore[reportAssignmentType]
    activation = heads.head_activation(net)
    projector = heads.projector(num_features, model.head_width, model.dim, activation)
    predictor = heads.predictor(model.dim, model.head_width, activation)
    if model.identity_predictor:
        heads.start_as_identity(predictor)
    online = OnlineNet(net, projector, predictor)
    return online, MomentumNet(deepcopy(online.backbone), deepcopy(online.projector))
