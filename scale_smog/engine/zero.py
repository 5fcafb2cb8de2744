"""DeepSpeed ZeRO: every rank updates a slice of the parameters; the only importer of deepspeed.

DeepSpeed hands its optimizer one flat tensor, so a LARS given to it would see one layer. Here its
optimizer is a callback that runs the engine's own over the parts of the parameters in that tensor.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale_smog.engine.base import Engine, is_excluded
from scale_smog.errors import UserError
from scale_smog.optim import Shard

REDUCE_BUCKET_NUMEL = 50_000_000  # DeepSpeed allocates the whole bucket: 200 MB in fp32


class ZeroEngine(Engine):
    """ZeRO stage 1: gradients are averaged everywhere, optimizer state is split."""

    def _prepare(self, batch: int) -> nn.Module:
        deepspeed = _import_deepspeed(self.device)
        self.norm_group = dist.group.WORLD
        parameters = list(self.online.parameters())
        self._numbers = {
            name: (number, is_excluded(name, p))
            for number, (name, p) in enumerate(self.online.named_parameters())
        }
        self._deepspeed, *_ = deepspeed.initialize(
            model=self.online,
            optimizer=_Callback(parameters, self._run_optimizer),
            config=self._settings(batch),
            dist_init_required=False,
        )
        return self._deepspeed

    def _settings(self, batch: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": 1,
                "reduce_bucket_size": REDUCE_BUCKET_NUMEL,
                "allgather_bucket_size": REDUCE_BUCKET_NUMEL,
            },
            # An empty list of modules keeps gradients in fp32 on the wire; by default those of
            # convolutions would travel in bf16 and the engines would disagree.
            "torch_autocast": {
                "enabled": self._is_bf16,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }

    def _build_shards(self) -> list[Shard]:
        zero = self._deepspeed.optimizer
        self._flat_grads: list[tuple[nn.Parameter, Tensor, int]] = []
        shards = []
        for flat, group in zip(
            zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True
        ):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is None:  # this rank holds nothing of the parameter
                    continue
                name = zero.param_names[parameter]
                number, excluded = self._numbers[name]
                in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
                part = flat.detach()[in_flat.start : in_flat.start + in_flat.numel]
                value = nn.Parameter(part)  # shares the memory of the flat tensor
                self._flat_grads.append((value, flat, in_flat.start))
                shards.append(Shard(name, number, value, in_parameter.start, excluded))
        return shards

    def _run_optimizer(self) -> None:
        """Called by DeepSpeed inside `step`, when the flat tensors hold averaged gradients."""
        for value, flat, start in self._flat_grads:
            assert flat.grad is not None
            value.grad = flat.grad[start : start + value.numel()]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Backward pass; gradients are averaged over ranks while it runs."""
        self._deepspeed.backward(loss)

    def _step(self) -> None:
        self._deepspeed.step()

    def _after_load(self) -> None:
        self._deepspeed.optimizer.update_lp_params()


class _Callback(torch.optim.Optimizer):
    """What DeepSpeed takes for an optimizer."""

    def __init__(self, parameters: list[nn.Parameter], run: Callable[[], None]):
        super().__init__(parameters, {"lr": 1.0})
        self._run = run

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._run()


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"engine.kind=zero1 needs deepspeed ({error}); or take ddp") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
