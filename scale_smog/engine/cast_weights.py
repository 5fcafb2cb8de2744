"""Weights in bf16 for autocast, a stage's in one launch: by itself it casts them one by one.

Backward, a stage's gradients arrive together: they are cast, and where they stay from step to step
also put there, at once. For ResNet-50 these are two launches a stage, not three a parameter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scale_smog.models import stages

DTYPE = torch.bfloat16
CAST = (nn.Conv2d, nn.Linear)  # of other types, subclasses too, autocast knows what they need


class CastWeights:
    """Makes a net compute with copies of its weights; results are autocast's, bit by bit.

    Args:
        net: one of the two, whose `forward` runs under autocast to bf16. Parameters stay what and
            where they are.
        keeps_gradients: the first backward pass after `new_step` overwrites the parameters' `.grad`
            where it is, as hooks on them will see; later ones add to it.
    """

    def __init__(self, net: nn.Module, keeps_gradients: bool = False):
        self._copies: dict[nn.Module, tuple[Tensor, ...]] | None = None  # of the pass that runs
        self._parts: list[_Part] = []
        known: set[nn.Parameter] = set()
        backbone = net.get_submodule("backbone")
        heads = [x for name, x in net.named_children() if name != "backbone"]
        for module in dict.fromkeys([*stages(backbone), backbone, *heads]):
            part = _Part(module, known, keeps_gradients)
            module.forward = partial(self._run, part, module.forward)
            self._parts.append(part)
        self._others = [p for p in net.parameters() if p not in known]
        net.forward = partial(self._run_net, net.forward)

    def new_step(self) -> None:
        """Gradients have been used: those that the next pass does not overwrite are dropped."""
        dropped = [*self._others]
        for part in self._parts:
            if not part.is_written:
                dropped += part.parameters
            part.is_written = False
        for parameter in dropped:
            parameter.grad = None

    def _run_net(self, forward: Callable[..., Any], *views: Any) -> Any:
        self._copies = {}
        try:
            return forward(*views)
        finally:
            self._copies = None

    def _run(
        self, part: "_Part", forward: Callable[..., Any], *inputs: Any, **keywords: Any
    ) -> Any:
        if self._copies is None:  # a part of the net is called by itself, or computed again
            return forward(*inputs, **keywords)
        # Once for views of all sizes, and not before the part is entered: autograd takes first what
        # was made last, so a part's gradients are ready, and sent, before earlier parts' are.
        if part.module not in self._copies:
            self._copies[part.module] = _Cast.apply(part, *part.parameters)
        with part.holding(self._copies[part.module]):
            return forward(*inputs, **keywords)


class _Part:
    """Parameters of a module that no part before it has: those that are cast, or all.

    Args:
        module: whose `forward` computes with them.
        known: parameters of earlier parts; the part's own are added.
        keeps_gradients: as of `CastWeights`; then the part has parameters that are not cast too.
    """

    def __init__(self, module: nn.Module, known: set[nn.Parameter], keeps_gradients: bool):
        self.module, self.keeps_gradients, self.is_written = module, keeps_gradients, False
        self.parameters: list[nn.Parameter] = []
        self.is_cast: list[bool] = []
        self._places: list[tuple[dict[str, Any], str]] = []
        for child in module.modules():
            for name, parameter in child.named_parameters(recurse=False):
                if parameter not in known and (keeps_gradients or type(child) in CAST):
                    known.add(parameter)
                    self.parameters.append(parameter)
                    self.is_cast.append(type(child) in CAST)
                    self._places.append((child._parameters, name))

    @contextmanager
    def holding(self, copies: tuple[Tensor, ...]) -> Iterator[None]:
        """Inside, the modules have these in their parameters' places, as in `functional_call`."""
        for (parameters, name), copy in zip(self._places, copies, strict=True):
            parameters[name] = copy
        try:
            yield
        finally:
            for (parameters, name), own in zip(self._places, self.parameters, strict=True):
                parameters[name] = own

    def split(self, tensors: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Of a tensor a parameter: those of what is cast, and the others."""
        both = list(zip(tensors, self.is_cast, strict=True))
        return [x for x, is_cast in both if is_cast], [x for x, is_cast in both if not is_cast]

    def merge(self, cast: list[Tensor], others: list[Tensor]) -> list[Tensor]:
        """What `split` has split."""
        left, right = iter(cast), iter(others)
        return [next(left if is_cast else right) for is_cast in self.is_cast]


class _Cast(torch.autograd.Function):
    """Parameters to what a part computes with; backward, gradients of these to the parameters'."""

    @staticmethod
    def forward(ctx: Any, part: _Part, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.part = part
        masters, others = part.split(parameters)
        copies = [torch.empty_like(x, dtype=DTYPE) for x in masters]
        _copy(copies, masters)
        return tuple(part.merge(copies, others))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        part: _Part = ctx.part
        low, others = part.split(grads)
        kept = [p.grad for p in part.parameters if p.grad is not None]
        if part.keeps_gradients and not part.is_written and len(kept) == len(grads):
            into_low, into_others = part.split(kept)
            _copy(into_low, low)
            _copy(into_others, others)
            part.is_written = True
            return None, *[None] * len(grads)
        part.is_written = True
        masters, _ = part.split(part.parameters)
        full = [torch.empty_like(x) for x in masters]
        _copy(full, low)
        return None, *part.merge(full, others)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
