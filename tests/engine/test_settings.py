"""What an engine's section may say, and what becomes of it."""

from typing import Any

import engine_runs as runs
import pytest
import torch
from ranks import run_on_ranks
from small_recipe import small_recipe

from scale_smog import UserError
from scale_smog.config import DataConfig, ModelConfig
from scale_smog.models import OnlineNet, average_running_stats, stages, unsynchronised_running_stats
from scale_smog.models.backbones import build_backbone
from scale_smog.profiling.memory import _SavedTensors, plan_memory


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("{gradient_clipping: 1.0}", "optimizer.clip_norm"),
        ("{gradient_accumulation_steps: 4}", "engine.accumulate"),
        ("{bf16: {enabled: true}}", "engine.precision"),
        ("{torch_autocast: {enabled: true}}", "engine.precision"),
        ("{optimizer: {type: Adam}}", "optimizer.name"),
        ("{zero_optimization: {stage: 3}}", "engine.kind"),
        ("{zero_optimization: {zero_quantized_gradients: true}}", "overlap_comm"),
        ("{zero_optimisation: {overlap_comm: true}}", "zero_optimization"),
        ("{zero_optimization: {round_robin_gradients: true}}", "round_robin_gradients might"),
    ],
)
def test_deepspeed_settings_that_change_the_training_are_refused(tmp_path, setting, words):
    with pytest.raises(UserError, match=words):
        small_recipe(tmp_path, "x", "engine.kind=zero2", f"engine.deepspeed={setting}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.deepspeed={dump_state: true}"], "not engine.kind=ddp"),
        (["engine.kind=zero3", "engine.compile=true"], "take fsdp"),
        (
            ["engine.kind=zero3", "engine.deepspeed={zero_optimization: {overlap_comm: true}}"],
            "does not wait for the last step's updates",
        ),
        (["method.name=moco_v3", "model.identity_predictor=true"], "moco_v3 has no predictor"),
        (["run.stop_below={knn: 0.2}"], "knn is logged only with run.evaluate_every"),
        (["run.stop_below={group_perplexity: 9}", "method.name=simclr"], "a method with groups"),
        (["run.dir=~/runs/x"], "no shell replaces ~"),
        (
            [
                *("grouping.init=random", "grouping.kmeans=false", "grouping.bank_steps=1"),
                *("grouping.instance_warmup_steps=9", "grouping.num_groups=20"),
            ],
            "more than the 12 features",
        ),
        (["engine.kind=zero2", "engine.precision=fp64"], "ddp, fsdp and hsdp"),
        (["engine.precision=fp64", "engine.reduce_precision=bf16"], "reduce_precision"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        small_recipe(tmp_path, "x", *overrides)


def settings_and_weights(folder: Any) -> dict[str, Any]:
    """What DeepSpeed was told, and what reduction in bfloat16 changes on each engine."""
    deepspeed = {
        "wall_clock_breakdown": False,
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 600},
    }
    recipe = runs.recipe_of(folder / "zero", kind="zero2", deepspeed=deepspeed)
    state = runs.build_state(recipe)
    zero = state.engine._deepspeed._config.zero_config
    runs.run(recipe, state, num_steps=3)
    for kind in ("ddp", "zero1", "fsdp"):
        for precision in ("fp32", "bf16"):
            recipe = runs.recipe_of(
                folder / kind / precision, kind=kind, reduce_precision=precision
            )
            runs.run(recipe, runs.build_state(recipe), num_steps=3)
    return {"overlap": zero.overlap_comm, "bucket": zero.reduce_bucket_size, "stage": zero.stage}


def test_deepspeed_settings_arrive_and_gradients_can_travel_in_bfloat16(tmp_path):
    for told in run_on_ranks(2, settings_and_weights, tmp_path):
        assert told == {"overlap": True, "bucket": 600, "stage": 2}
    exact = runs.plain_run(runs.recipe_of(tmp_path), num_steps=3)
    assert max(runs.difference(runs.final_state(tmp_path / "zero"), exact).values()) < 1e-6
    for kind in ("ddp", "zero1", "fsdp"):
        full, short = (runs.final_state(tmp_path / kind / x) for x in ("fp32", "bf16"))
        assert max(runs.difference(full, exact).values()) < 1e-6
        assert 1e-6 < runs.difference(short, exact)["online"] < 1e-2, kind


def statistics_of_scopes(folder: Any) -> dict[Any, bool]:
    """Whether ranks hold the same statistics after some steps, by scope."""
    same = {}
    for scope in ("global", "node", 2, "local"):
        recipe = runs.recipe_of(folder / str(scope), batch_norm=scope)
        state = runs.build_state(recipe)
        runs.run(recipe, state, num_steps=2)
        nets = {"o": state.engine.online, "m": state.engine.momentum}
        buffers = {f"{n}.{k}": x for n, net in nets.items() for k, x in net.named_buffers()}
        same[scope] = runs.same_on_all_ranks(buffers)
    own = [torch.full((3,), float(torch.distributed.get_rank()))]
    average_running_stats(own)
    assert own[0].tolist() == [0.5] * 3
    assert not unsynchronised_running_stats([torch.nn.Linear(2, 2)])
    return same


def test_ranks_hold_the_same_statistics_whatever_the_scope_of_batch_norm(tmp_path):
    for same in run_on_ranks(2, statistics_of_scopes, tmp_path):
        assert same == {"global": True, "node": True, 2: True, "local": True}
    whole, local = (runs.final_state(tmp_path / x) for x in ("global", "local"))
    assert runs.difference(local, whole)["online"] > 1e-5


def test_stages_of_nets():
    expected = {"resnet_tiny": 3, "resnet18": 4, "swin_tiny": 4, "vit_tiny_patch16_224": 12}
    for name, num_stages in expected.items():
        assert len(stages(build_backbone(name))) == num_stages, name
    net = torch.nn.Linear(2, 2)
    assert stages(net) == [net]


def test_the_plan_knows_what_each_engine_splits():
    """Of a net beside which DeepSpeed's bucket is small."""

    def plan(kind: str):
        engine = {"kind": kind, "precision": "fp32"}
        recipe = runs.recipe_of("x", **engine).model_copy(
            update={
                "model": ModelConfig(backbone="resnet50", width=4)
            }  # DeepSpeed's bucket is small
        )
        recipe = recipe.model_copy(
            update={"data": DataConfig(path="", global_batch=4096, large_px=32, small_px=32)}
        )
        return plan_memory(recipe, 64)

    plans = {kind: plan(kind) for kind in runs.ENGINES}
    held = {kind: memory.total_mib for kind, memory in plans.items()}
    assert held["fsdp"] < held["hsdp"] < held["ddp"]
    # zero1's gradients come while activations go, so zero2 holds less of them and as much in all.
    assert held["zero2"] == pytest.approx(held["zero1"], rel=0.01)
    assert held["zero1"] < 0.75 * held["ddp"]
    shares = {kind: memory.momentum_net_mib for kind, memory in plans.items()}
    assert shares["zero3"] == pytest.approx(shares["zero2"] / 64)


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny"])
def test_the_plan_of_a_checkpointed_net_holds_a_stage_and_the_others_inputs(name):
    recipe = runs.recipe_of("x").model_copy(
        update={
            "model": ModelConfig(backbone=name),
            "data": DataConfig(path="", global_batch=4096, num_small_crops=4),
        }
    )
    engine = recipe.engine.model_copy(update={"activation_checkpointing": True})
    checkpointed = recipe.model_copy(update={"engine": engine})
    all_held, held = (plan_memory(x, 64).activations_mib for x in (recipe, checkpointed))
    num_passes = 2 * 4  # of two sizes of views through four stages; one holds the mean at least
    assert all_held / num_passes < held < 0.5 * all_held


def test_a_checkpointed_stage_is_counted_with_the_inputs_of_all():
    backbone = torch.nn.Sequential()
    for name in ("layer1", "layer2"):
        backbone.add_module(name, torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(3))))
    saved = _SavedTensors(OnlineNet(backbone, torch.nn.Identity(), torch.nn.Identity()))
    with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda x: x):
        backbone(torch.randn(2, 5, requires_grad=True))
    assert saved.numel() == 6 * 10  # a ReLU keeps its result
    held = max(numel for _, numel in saved.numel_of_stages())
    assert held == 2 * 10 + 3 * 10  # both inputs, and the second stage's results
