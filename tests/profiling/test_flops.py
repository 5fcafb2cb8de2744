"""What a step computes and moves, against torch's own counter and against pencil and paper."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scale_smog.config import DataConfig, ModelConfig
from scale_smog.models import build_backbone, build_nets
from scale_smog.profiling.flops import OpCounter, count_step, roofline_s

DATA = DataConfig(path="", large_px=64, small_px=32, num_small_crops=2)


def forward_flops(backbone: torch.nn.Module, px: int) -> float:
    """Of one image."""
    with OpCounter(4) as counter, torch.no_grad():
        backbone(torch.empty(1, 3, px, px, device="meta"))
    return sum(op.flops for op in counter.take())


def test_flops_of_a_step_are_those_of_torchs_counter():
    model = ModelConfig(backbone="resnet18")
    cost = count_step(model, DATA, batch=2, precision="fp32")
    with torch.device("meta"):
        online, momentum = build_nets(model)
        large, small = torch.empty(2, 3, 64, 64), torch.empty(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            momentum(large)
        z, p, _ = online(large, [small, small])
        (z.sum() + p.sum()).backward()
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_flops_of_attention_are_those_of_torchs_counter():
    with torch.device("meta"):
        swin, images = build_backbone("swin_tiny"), torch.empty(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        swin(images)
    assert forward_flops(swin, 64) == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize(
    ("width", "gflop"), [(1, 8.17), (2, 32.2), (4, 128.0)]
)  # multiply-adds of ResNet-50 are printed as 4.09 G; SimCLR's x2 and x4 scale by width squared
def test_a_forward_pass_of_resnet50_has_the_published_flops(width, gflop):
    with torch.device("meta"):
        backbone = build_backbone("resnet50", width)
    assert forward_flops(backbone, 224) / 1e9 == pytest.approx(gflop, rel=0.01)


def test_a_backward_pass_costs_two_forward_passes_but_for_the_pixels_gradient():
    cost = count_step(ModelConfig(), DataConfig(path=""), batch=4, precision="bf16")
    forward = sum(op.flops for op in cost.online_forward)
    backward = sum(op.flops for op in cost.backward)
    assert 1.9 < backward / forward < 2.0


def test_roofs_are_ordered_and_bound_by_bytes_for_resnet50_but_not_for_x4():
    flops_per_s, bytes_per_s = 989e12, 4.8e12
    for width, limit in ((1, 0.5), (4, 1.0)):
        cost = count_step(ModelConfig(width=width), DataConfig(path=""), 64, "bf16")
        arithmetic = cost.flops / flops_per_s
        folded = roofline_s(cost.ops, flops_per_s, bytes_per_s, folded=True)
        eager = roofline_s(cost.ops, flops_per_s, bytes_per_s)
        assert arithmetic < folded < eager
        assert limit / 2 < arithmetic / folded < limit


def test_every_gradient_becomes_ready_once_and_the_stem_last():
    model = ModelConfig(backbone="resnet18")
    cost = count_step(model, DATA, batch=2, precision="fp32")
    with torch.device("meta"):
        online, _ = build_nets(model)
    assert len(cost.ready) == len(list(online.parameters()))
    assert sum(ready.numel for ready in cost.ready) == sum(p.numel() for p in online.parameters())
    assert cost.ready[-1].numel == online.backbone.conv1.weight.numel()
    places = [ready.num_ops for ready in cost.ready]
    assert places == sorted(places) and places[-1] <= len(cost.backward)


def test_batch_norms_are_counted_for_every_pass():
    model = ModelConfig(backbone="resnet18")
    with_crops = count_step(model, DATA, batch=2, precision="fp32")
    assert len(with_crops.norm_channels) == 2 * (20 + 3)  # large views, small views together
    assert len(with_crops.momentum_norm_channels) == 20 + 2  # it has no predictor


def test_the_cost_of_a_batch_follows_from_that_of_two_others():
    model = ModelConfig(backbone="resnet_tiny")
    few, more, many = (count_step(model, DATA, batch, "fp32") for batch in (2, 4, 10))
    derived = few.at_batch(10, more, (2, 4))
    for ours, counted in zip(derived.ops, many.ops, strict=True):
        assert ours.flops == pytest.approx(counted.flops)
        assert ours.bytes == pytest.approx(counted.bytes)
