"""What is DDP's own."""

import pytest
import torch
from torch import nn

from scale_smog.engine.ddp import match_gradient_strides


@pytest.mark.parametrize("size", [1, 3])
def test_weights_have_the_strides_of_their_gradients(size):
    """Else DDP, whose buckets have the weights' strides, copies every gradient and warns."""
    net = nn.Conv2d(12, 8, size, bias=False)
    before = net.weight.detach().clone()
    match_gradient_strides(net)
    images = torch.randn(2, 12, 5, 5).contiguous(memory_format=torch.channels_last)
    net(images).square().sum().backward()
    assert net.weight.grad is not None
    assert net.weight.grad.stride() == net.weight.stride() and torch.equal(net.weight, before)
