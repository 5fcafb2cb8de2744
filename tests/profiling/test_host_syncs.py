"""The step waits for the GPU once, to learn whether gradients are finite: counted on tensors that
have shapes and no values.

On the meta device every result that the host would have to read is missing, so that nothing can
wait unnoticed; the code takes the ways it takes on a GPU.
"""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scale_smog.config import MethodConfig, Recipe
from scale_smog.data.batch import Batch
from scale_smog.grouping import ImageClusters, groups, kmeans
from scale_smog.loop import train_step
from scale_smog.methods import METHODS
from scale_smog.state import build_state
from scale_smog.throughput import FIXED_VALUES

B, PX = 4, 16
META = torch.device("meta")
VERDICT = {"copy to the host": 1}  # whether all gradients are finite, and no rank is to stop
SHAPED_BY_VALUES = {"nonzero", "masked_select", "unique_dim", "_unique2", "bincount"}


class SyncCounter(TorchDispatchMode):
    """Counts what makes the host wait: results that it reads, and copies from or to the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_meta:
            self.found["item"] += 1
            return 0.0
        self.found[name] += name in SHAPED_BY_VALUES
        if name == "_to_copy" and args[0].is_meta and "device" in kwargs:
            if kwargs["device"] != META:
                self.found["copy to the host"] += 1
                return torch.zeros(args[0].shape)
        if name == "_fused_sgd_":  # in place, and unknown to the meta device
            return None
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and result.is_meta:
            source = args[1] if name == "copy_" else args[0]
            self.found["copy to the GPU"] += not source.is_meta and source.dim() > 0
        return result


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    for module in (groups, kmeans):
        monkeypatch.setattr(module, "full_float32", lambda _device: nullcontext())  # meta has none


def count_syncs(recipe: Recipe, extra: Any = None) -> dict[str, int]:
    """What a second step waits for; the first makes the optimizer's state."""
    state = build_state(recipe, B, META)
    views = [torch.randn(B, 3, PX, PX, device=META) for _ in range(3)]
    label = torch.zeros(B, dtype=torch.int64)
    batch = Batch(views[:2], views[2:], label, label)
    with SyncCounter() as counter:
        train_step(state, batch, FIXED_VALUES)
        counter.found.clear()
        train_step(state, batch, FIXED_VALUES)
        if extra:
            extra(state)
    return {name: num for name, num in counter.found.items() if num}


def recipe_of(**sections: Any) -> Recipe:
    base: dict[str, Any] = {
        "run": {"steps": 2},
        "data": {"path": "", "global_batch": B, "large_px": PX, "num_small_crops": 1},
        "model": {"backbone": "resnet_tiny", "head_width": 32, "dim": 16},
        "grouping": {"num_groups": 10, "kmeans": False, "init": "random", "bank_steps": 4},
        "engine": {"precision": "fp32"},
    }
    return Recipe.model_validate(base | sections)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
def test_a_step_waits_for_one_number_and_nothing_else(optimizer, clip_norm):
    settings = {"name": optimizer, "clip_norm": clip_norm}
    assert count_syncs(recipe_of(optimizer=settings)) == VERDICT


@pytest.mark.parametrize("name", [name for name in METHODS if name != MethodConfig().name])
def test_a_step_of_every_method_waits_for_one_number(name, monkeypatch):
    monkeypatch.setattr(ImageClusters, "find", lambda *_: None)  # once an epoch
    method = {"name": name, "queue_steps": 2, "queue_after_epochs": 0.0}
    crops = {"num_small_crops": int(MethodConfig(name=name).has_groups)}
    data = {"path": "", "global_batch": B, "large_px": PX, "small_px": 8, **crops}
    found = count_syncs(recipe_of(method=method, data=data))
    found.pop("copy to the GPU", None)  # the images' ids: CUDA takes so few bytes at once
    assert found == VERDICT


@pytest.mark.parametrize(
    ("wait", "found"),
    [
        (lambda state: state.method.groups.counts.cpu(), "copy to the host"),
        (lambda state: state.method.groups.counts.sum().item(), "item"),
        (lambda state: torch.zeros(3).to(META), "copy to the GPU"),
    ],
)
def test_the_counter_counts(wait, found):
    assert Counter(count_syncs(recipe_of(), wait)) - Counter(VERDICT) == {found: 1}
