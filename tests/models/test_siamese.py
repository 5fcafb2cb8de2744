"""Promises of the online and the momentum net."""

import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from scale_smog.config import ModelConfig
from scale_smog.models import MomentumNet, OnlineNet, build_nets, synchronise_batch_norm
from scale_smog.models.siamese import unit

NET = ModelConfig(backbone="resnet_tiny", dim=16, head_width=24)


def nets() -> tuple[OnlineNet, MomentumNet]:
    torch.manual_seed(0)
    return build_nets(NET)


def views(num_images: int = 4) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    large = torch.randn(num_images, 3, 32, 32)
    return large, [torch.randn(num_images, 3, 16, 16) for _ in range(3)]


def test_large_view_gives_projections_and_predictions() -> None:
    online, _ = nets()
    large, _ = views()
    z, p, _ = online(large, [])
    projected = online.projector(online.backbone(large))
    assert z.shape == (4, 16) and p.shape == (1, 4, 16)
    torch.testing.assert_close(z, unit(projected))
    torch.testing.assert_close(p[0], unit(online.predictor(projected)))


def test_small_views_follow_the_large_one_in_order() -> None:
    online, _ = nets()
    large, small = views()
    online.eval()  # no batch statistics: every view can be predicted by itself
    _, p, _ = online(large, small)
    alone = [online(view, [])[1] for view in (large, *small)]
    assert p.shape == (4, 4, 16)
    torch.testing.assert_close(p, torch.cat(alone), rtol=0, atol=1e-5)


def test_small_views_leave_the_projections_of_the_large_one_alone() -> None:
    online, _ = nets()
    large, small = views()
    assert torch.equal(online(large, small)[0], online(large, [])[0])


def test_small_views_share_one_pass() -> None:
    online, _ = nets()
    large, small = views()
    batches = []
    online.backbone.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    online(large, small)
    assert batches == [4, 12]


def test_outputs_have_unit_length_in_float32_under_autocast() -> None:
    online, momentum = nets()
    large, small = views()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [*online(large, small)[:2], momentum(large)]
    for output in outputs:
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.norm(dim=-1), torch.ones(output.shape[:-1]))
    assert online.double()(large.double())[0].dtype == torch.float64


def test_momentum_net_starts_as_a_copy_with_the_same_names() -> None:
    online, momentum = nets()
    expected = {k: v for k, v in online.state_dict().items() if not k.startswith("predictor.")}
    assert list(momentum.state_dict()) == list(expected)
    torch.testing.assert_close(dict(momentum.state_dict()), expected, rtol=0, atol=0)
    large, _ = views()
    assert torch.equal(momentum(large), online(large, [])[0])

    online_tensors = {tensor.data_ptr() for tensor in online.state_dict().values()}
    assert not any(t.data_ptr() in online_tensors for t in momentum.state_dict().values())


def test_momentum_net_has_no_gradients_and_batch_statistics() -> None:
    online, momentum = nets()
    large, _ = views()
    assert not any(parameter.requires_grad for parameter in momentum.parameters())
    assert all(parameter.requires_grad for parameter in online.parameters())
    assert not momentum(large).requires_grad
    assert momentum.training
    assert momentum.projector.bn2.num_batches_tracked == 1


def gradients_and_buffers(online: OnlineNet, images: list[Tensor], ddp: bool) -> dict[str, Tensor]:
    net = DistributedDataParallel(online) if ddp else online
    z, p, _ = net(images[0], images[1:])
    (z[:, 0].mean() + p.square()[..., 0].mean()).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in online.named_parameters()}
    return gradients | dict(online.named_buffers())


def double_batch_and_net() -> tuple[OnlineNet, list[Tensor]]:
    large, small = views()
    return nets()[0].double(), [view.double() for view in (large, *small)]


def gradients_of_this_rank() -> dict[str, Tensor]:
    online, images = double_batch_and_net()
    synchronise_batch_norm(online, dist.group.WORLD)
    share = [view.tensor_split(2)[dist.get_rank()] for view in images]
    return gradients_and_buffers(online, share, ddp=True)


def test_gradients_on_two_ranks_equal_those_of_the_whole_batch() -> None:
    online, images = double_batch_and_net()
    expected = gradients_and_buffers(online, images, ddp=False)
    for results in run_on_ranks(2, gradients_of_this_rank):
        torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-12)
