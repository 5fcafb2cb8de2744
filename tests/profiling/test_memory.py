"""The memory plan; the rehearsed allocator is its judge (tests/cuda/rehearsal_matrix.py)."""

import torch

from scale_smog.config import Recipe
from scale_smog.profiling.memory import _count, plan_memory


def test_memory_that_two_operations_save_is_held_once():
    x = torch.empty(4, 6, device="meta")
    saved = [{0: x, 1: x.view(6, 4)}, {2: x[:2], 3: torch.empty(5, device="meta")}]
    assert _count(saved) == x.numel() + 5


def test_a_stages_gradients_are_held_together_where_they_are_cast_together():
    def activations_mib(**engine: object) -> float:
        sections = {"run": {"steps": 1}, "data": {"path": "", "global_batch": 64}, "engine": engine}
        return plan_memory(Recipe.model_validate(sections), 2).activations_mib

    last_stage_mib = 2 * 14.96e6 / 2**20  # of ResNet-50, in bf16
    together = activations_mib(kind="ddp") - activations_mib(kind="ddp", compile=True)
    assert abs(together - last_stage_mib) < 0.1
    assert activations_mib(kind="fsdp") == activations_mib(kind="fsdp", compile=True)
