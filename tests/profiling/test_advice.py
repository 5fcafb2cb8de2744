"""The one sentence of advice: it names the part that costs the most and a setting that exists."""

import re

import pytest
import torch

from scale_smog.config import Recipe
from scale_smog.pretrain import precision_remarks
from scale_smog.profiling.advice import bottleneck
from scale_smog.profiling.step_profile import PARTS

CALM = dict.fromkeys(PARTS, 0.0) | {"online_forward": 3.0, "momentum_forward": 3.0, "backward": 6.0}


def recipe_of(**sections) -> Recipe:
    return Recipe.model_validate({"run": {"epochs": 1}, "data": {"path": ""}} | sections)


@pytest.mark.parametrize(
    ("part", "seconds", "key"),
    [
        ("data_wait", 6.0, "data.workers"),
        ("communication", 6.0, "model.batch_norm"),
        ("optimizer", 6.0, "engine.kind"),
        ("kmeans", 2.0, "grouping.reset_every"),
        ("grouping", 6.0, "groups"),
        ("ema", 0.1, "engine.compile"),  # nothing stands out: the nets are what there is
    ],
)
def test_the_costliest_part_gets_a_setting_that_exists(part, seconds, key):
    sentence = bottleneck(recipe_of(), CALM | {part: seconds}, on_gpu=True, memory_share=0.9)
    assert key in sentence and sentence.count(".\n") == 0 and sentence.endswith(".")
    for section, name in re.findall(r"\b([a-z]+)\.([a-z_]+)=", sentence):
        assert name in type(getattr(recipe_of(), section)).model_fields


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_processor_without_bf16_is_advised_to_take_fp32(monkeypatch, has_bf16):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    recipe = recipe_of()
    assert recipe.engine.precision == "bf16"
    sentence = bottleneck(recipe, CALM, on_gpu=False, memory_share=0.0)
    assert ("engine.precision=fp32" in sentence) == (not has_bf16)
    assert bool(precision_remarks(recipe, torch.device("cpu"))) == (not has_bf16)
    assert not precision_remarks(recipe, torch.device("cuda"))


def test_advice_that_is_followed_already_is_not_repeated():
    waiting = CALM | {"communication": 6.0}
    first = bottleneck(recipe_of(), waiting, True, 0.9)
    second = bottleneck(recipe_of(model={"batch_norm": "node"}), waiting, True, 0.9)
    assert "batch_norm=node" in first and "reduce_precision=bf16" in second
