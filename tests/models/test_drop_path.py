"""Drop path: timm's, with draws that a step can repeat."""

from unittest import mock

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from scale_smog.errors import UserError
from scale_smog.models import build_backbone
from scale_smog.models.drop_path import draw_factors, drop_paths, dropped

RATE, NUM_IMAGES = 0.4, 6
NETS = {  # and how timm is asked for images of other sizes
    "test_vit": {"dynamic_img_size": True},
    "swin_tiny_patch4_window7_224": {"strict_img_size": False},
    "test_convnext": {},
}


@pytest.mark.parametrize("name", NETS)
def test_a_net_computes_what_timms_computes_with_the_same_draws(name: str) -> None:
    ours = build_backbone(name, drop_path=RATE).double().train()
    images = torch.randn(NUM_IMAGES, 3, 32, 32, dtype=torch.float64)
    paths = drop_paths(ours)
    factors = draw_factors([p.rate for p in paths], 0, 0, range(NUM_IMAGES), 1).flatten(1)
    theirs = timm.create_model(name, num_classes=0, drop_path_rate=RATE, **NETS[name])
    theirs.double().train().load_state_dict(ours.state_dict())
    kept = iter(factors > 0)

    def drawn(mask: Tensor, p: float) -> Tensor:
        return mask.copy_(next(kept).view(mask.shape))

    with torch.no_grad(), dropped(paths, factors):
        found = ours(images)
    with torch.no_grad(), mock.patch.object(torch.Tensor, "bernoulli_", drawn):
        expected = theirs(images)
    assert next(kept, None) is None  # every branch has drawn once
    assert (factors == 0).any() and (found - expected).abs().max() < 1e-12
    with torch.no_grad():
        assert (ours(images) - found).abs().max() > 1e-9  # ConvNeXt's branches begin at 1e-6


def test_rates_grow_with_depth_as_timms_do() -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.3)
    expected = [m.drop_prob for m in theirs.modules() if type(m).__name__ == "DropPath"]
    rates = [
        path.rate for path in drop_paths(build_backbone("vit_tiny_patch16_224", 1, False, 0.3))
    ]
    assert rates == expected and len(rates) == 22 and max(rates) == pytest.approx(0.3)


def test_each_branch_is_left_out_at_its_rate_and_its_mean_stays() -> None:
    rates, num = [0.0, 0.05, 0.3, 0.9], 200_000
    factors = draw_factors(rates, seed=1, step=2, images=range(num), num_views=1)[:, 0]  # [L, B]
    for rate, own in zip(rates, factors.numpy(), strict=True):
        values = [1 / (1 - rate)] if rate == 0 else [0, 1 / (1 - rate)]
        assert np.allclose(np.unique(own), values, rtol=1e-15)
        error = (rate * (1 - rate) / num) ** 0.5
        assert abs((own == 0).mean() - rate) <= 4 * error
        assert abs(own.mean() - 1) <= 4 * error / (1 - rate)


def test_a_draw_is_of_the_seed_the_step_the_view_the_image_and_the_branch_alone() -> None:
    def draw(seed=1, step=2, images=range(64), num_views=3, num=5) -> Tensor:
        return draw_factors([0.5] * num, seed, step, images, num_views)  # [L, V, B]

    whole = draw()
    assert torch.equal(draw(images=range(16, 32)), whole[..., 16:32])
    assert torch.equal(draw(num_views=1), whole[:, :1])
    others = [draw(seed=2), draw(step=3), draw(images=range(64, 128))]
    others += [whole.roll(1, dims=0), whole.roll(1, dims=1)]  # of other branches, other views
    for other in others:
        assert 0.4 < (other == whole).double().mean() < 0.6


@pytest.mark.parametrize("name", ["resnet18", "vgg11"])
def test_a_net_without_drop_path_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"drop_path: {name} has none"):
        build_backbone(name, drop_path=0.1)
