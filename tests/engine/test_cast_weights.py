"""Weights cast a stage at a time: the same bits as autocast's, gradients where they stay."""

from contextlib import nullcontext
from unittest import mock

import engine_runs as runs
import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor

from scale_smog.config import EngineConfig, ModelConfig, OptimizerConfig
from scale_smog.engine import Engine, build_engine
from scale_smog.engine.cast_weights import CastWeights
from scale_smog.engine.stages import prepare_stages
from scale_smog.models import OnlineNet, build_nets

NUM_STEPS = 4


def loss_of(net: OnlineNet, seed: int = 0) -> Tensor:
    """Of a large and a small view, which share the weights' copies."""
    generator = torch.Generator().manual_seed(seed)
    large, small = (torch.rand(4, 3, px, px, generator=generator) for px in (16, 8))
    z, p, _ = net(large, [small])
    target = torch.rand(p.shape, generator=generator)
    return (p * target).sum() + (z * target[0]).sum()


def online_net(is_checkpointed: bool = False) -> OnlineNet:
    online, momentum = runs.build_tiny_nets(seed=0)
    config = EngineConfig(precision="bf16", activation_checkpointing=is_checkpointed)
    prepare_stages(online, momentum, config)
    online.forward = torch.autocast("cpu", torch.bfloat16)(online.forward)
    return online


def gradients(net: OnlineNet) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_loss_and_gradients_are_autocasts_bit_by_bit(is_checkpointed):
    plain, cast = online_net(is_checkpointed), online_net(is_checkpointed)
    CastWeights(cast)
    losses = [loss_of(net) for net in (plain, cast)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert gradients(plain).keys() == dict(plain.named_parameters()).keys()
    for name, grad in gradients(plain).items():
        assert torch.equal(grad, gradients(cast)[name]), name
    assert isinstance(cast.projector.get_submodule("fc1").weight, torch.nn.Parameter)


def test_a_net_that_calls_its_stages_with_keywords_trains():
    """timm's EVA and BEiT hand their blocks positions by keyword."""
    backbone = "eva02_tiny_patch14_224"
    online, _ = build_nets(ModelConfig(backbone=backbone, head_width=16, dim=8))
    CastWeights(online)
    with torch.autocast("cpu", torch.bfloat16):
        z, _, _ = online(torch.rand(2, 3, 224, 224), [])
    z.sum().backward()
    found = gradients(online)
    assert any("attn" in name for name in found) and all(x.isfinite().all() for x in found.values())


def test_kept_gradients_are_overwritten_by_a_new_step_and_added_to_within_one():
    net, twice = online_net(), online_net()
    weights = CastWeights(net, keeps_gradients=True)
    loss_of(net).backward()
    places = {name: grad.data_ptr() for name, grad in gradients(net).items()}
    weights.new_step()
    for seed in (1, 2):
        loss_of(net, seed).backward()
        loss_of(twice, seed).backward()
    assert places == {name: grad.data_ptr() for name, grad in gradients(net).items()}
    for name, grad in gradients(twice).items():
        torch.testing.assert_close(gradients(net)[name], grad, rtol=1e-6, atol=1e-8)


def test_a_part_called_by_itself_has_the_weights_of_the_last_update():
    net = online_net()
    CastWeights(net)
    images = torch.rand(4, 3, 16, 16)
    net(images, [])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    fresh = runs.build_tiny_nets(seed=0)[0]
    fresh.load_state_dict(net.state_dict())
    autocast = torch.autocast("cpu", torch.bfloat16)
    assert torch.equal(autocast(net.features)(images), autocast(fresh.features)(images))


def test_gradients_that_come_another_way_are_not_kept():
    net = online_net()
    net.register_parameter("temperature", torch.nn.Parameter(torch.ones(())))
    weights = CastWeights(net, keeps_gradients=True)
    for _ in range(2):
        (net.temperature * net(torch.rand(4, 3, 16, 16), [])[0].sum()).backward()
        weights.new_step()
        assert net.temperature.grad is None
        assert net.predictor.get_submodule("fc1").weight.grad is None  # p is not in the loss
        assert net.projector.get_submodule("fc1").weight.grad is not None


def step(engine: Engine, seed: int) -> None:
    loss = loss_of(engine._forward_online, seed)  # pyright: ignore[reportArgumentType]
    engine.backward(loss)
    assert engine.step(0.1, 1e-4)


def ddp_steps() -> tuple[list[int], list[list[Tensor]]]:
    """Where the gradients are after each step, and the weights at the end, also without casts."""
    places, ends = [], []
    for patch in (nullcontext(), mock.patch("scale_smog.engine.base.CastWeights", lambda *_: None)):
        online, momentum = runs.build_tiny_nets(seed=0)
        config = EngineConfig(kind="ddp", precision="bf16")
        with patch:
            engine = build_engine(online, momentum, OptimizerConfig(), config, batch=4)
        for seed in range(NUM_STEPS):
            step(engine, 10 * dist.get_rank() + seed)
            if not ends:
                places.append(
                    [p.grad.data_ptr() for p in online.parameters() if p.grad is not None]
                )
        ends.append([p.detach().clone() for p in online.parameters()])
    return places, ends


def test_ddp_keeps_gradients_in_its_buckets_and_trains_as_with_autocast_alone():
    """Its buckets are built anew once, in the second step."""
    (places, (cast, plain)), (_, (other_rank, _)) = run_on_ranks(2, ddp_steps)
    assert places[1] and places[1:] == places[1:2] * (NUM_STEPS - 1)
    assert all(torch.equal(a, b) for a, b in zip(cast, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(cast, other_rank, strict=True))
