"""Predictions: their form, their limits, and the published figures they must give."""

import pytest

from scale_smog import UserError
from scale_smog.config import Recipe
from scale_smog.profiling.communication_model import exposed_s
from scale_smog.profiling.hardware import FOLDER, _name_of, load_hardware
from scale_smog.profiling.scaling_model import (
    ENGINES,
    Measured,
    predict,
    predict_step,
    strong_scaling,
    weak_scaling,
    whole_parts,
)
from scale_smog.profiling.workload import Parts, Workload, estimate_parts

H200 = load_hardware("h200")


def recipe_of(width: int = 1, **sections) -> Recipe:
    base = {"run": {"epochs": 1}, "data": {"path": ""}, "model": {"width": width}}
    return Recipe.model_validate(base | sections)


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload.of(recipe_of(), 64)


def test_every_prediction_is_a_range_around_a_nominal_value():
    for x in weak_scaling(recipe_of(), H200, 64, gpus=(8, 1024)):
        low, nominal, high = x.images_per_s
        assert 0 < low < nominal < high
        assert 0.2 < x.efficiency <= 1.0


def test_one_gpu_waits_for_nobody(work):
    parts = estimate_parts(work, H200, 1)
    for engine in ENGINES:
        assert sum(exposed_s(work, parts, 1, engine, "global", H200, 1).values()) == 0
    assert predict_step(work, parts, 1, "ddp", "global", H200, 1) == pytest.approx(
        sum(parts.values())
    )


def test_measured_parts_of_a_share_are_scaled_back_to_the_whole(work):
    parts = estimate_parts(work, H200, 1)
    for engine in ENGINES:
        share = whole_parts({"optimizer": 1.0, "ema": 1.0, "backward": 1.0}, engine, 16, 8)
        assert share["backward"] == 1.0
        assert share["optimizer"] == {"ddp": 1, "hsdp": 8}.get(engine, 16)
        assert share["ema"] == {"zero3": 16, "fsdp": 16, "hsdp": 8}.get(engine, 1)
    assert whole_parts(parts, "zero1", 1, 1) == parts


def test_a_measured_step_corrects_the_prediction(work):
    estimated = estimate_parts(work, H200, 1)
    slower = Measured(work, {name: 2 * seconds for name, seconds in estimated.items()}, H200)
    plain = predict(recipe_of(), H200, 64, "ddp", "local", 32)
    corrected = predict(recipe_of(), H200, 64, "ddp", "local", 32, slower)
    assert 0.45 < corrected.images_per_s[1] / plain.images_per_s[1] < 0.6


def test_a_step_measured_on_one_gpu_predicts_another_gpus_own_speed(work):
    a100 = load_hardware("a100")
    as_estimated = Measured(work, estimate_parts(work, a100, 1), a100)
    plain = predict(recipe_of(), H200, 64, "ddp", "local", 64)
    moved = predict(recipe_of(), H200, 64, "ddp", "local", 64, as_estimated)
    assert moved.images_per_s[1] == pytest.approx(plain.images_per_s[1])


def test_the_hosts_idle_time_is_part_of_a_prediction(work):
    parts = estimate_parts(work, H200, 1)
    idle = {"other": sum(parts.values())}  # half of the step
    busy, waiting = (Measured(work, parts | other, H200) for other in ({}, idle))
    rates = [predict(recipe_of(), H200, 1, "ddp", "local", 64, x) for x in (busy, waiting)]
    assert rates[1].images_per_s[1] == pytest.approx(rates[0].images_per_s[1] / 2)


def test_passes_that_save_memory_cost_time(work):
    def of_x4(**engine) -> Parts:  # which the GPU limits, not the host
        return estimate_parts(Workload.of(recipe_of(4, engine=engine), 64), H200, 1)

    def online_s(**engine) -> float:
        return of_x4(**engine)["online_forward"] + of_x4(**engine)["backward"]

    forward = of_x4()["online_forward"]
    for engine in ({"accumulate": 2}, {"activation_checkpointing": True}):
        assert online_s(**engine) == pytest.approx(online_s() + forward, rel=0.01), engine
    waits = [
        exposed_s(
            Workload(recipe_of(engine={"accumulate": n}), 64, work.cost),
            estimate_parts(work, H200, 1), 64, "ddp", "global", H200, 1,
        )["batch_norm"]
        for n in (1, 2)
    ]  # fmt: skip
    assert waits[1] > 2 * waits[0]


def test_batch_norm_over_all_ranks_is_what_limits_x1_on_many_gpus():
    at_node = predict(recipe_of(), H200, 1024, "ddp", "node", 64)
    at_all = predict(recipe_of(), H200, 1024, "ddp", "global", 64)
    wide = predict(recipe_of(4), H200, 1024, "ddp", "global", 64)
    assert at_all.efficiency + 0.1 < at_node.efficiency and wide.efficiency > at_all.efficiency


def test_strong_scaling_keeps_the_global_batch_and_loses_to_launches():
    rows = strong_scaling(recipe_of(data={"path": "", "global_batch": 4096}), H200)
    assert [x.gpus for x in rows] == [8, 16, 32, 64, 128, 256, 512, 1024]
    efficiencies = [x.efficiency for x in rows]
    rate = [x.images_per_s[1] for x in rows]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert rate[-1] < 4 * rate[3]  # 16 times as many GPUs as 64


def test_published_efficiencies_lie_in_ranges_of_at_most_a_fifth(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parents[2] / "benchmarks"))
    import scaling

    a100 = load_hardware("a100")
    r50 = scaling.supervised(a100, "resnet50", 256, 8, alone=2470.0)
    r152 = scaling.supervised(scaling.without_loader(a100), "resnet152", 64, 8)
    for (low, nominal, high), published in ((r50, 0.84), (r152, 0.974)):
        assert low <= published <= high
        assert nominal * 0.8 <= low and high <= nominal * 1.2


@pytest.mark.parametrize("name", ["h200", "h100", "a100"])
def test_hardware_files_hold_ranges_from_good_to_bad(name):
    machine = load_hardware(name)
    for key in ("roofline_fraction", "loader_images_per_s", "overlap"):
        good, nominal, bad = getattr(machine, key)
        assert good >= nominal >= bad
    for key in ("op_us", "straggler"):
        good, nominal, bad = getattr(machine, key)
        assert good <= nominal <= bad


def test_a_wrong_hardware_file_is_explained_in_one_line(tmp_path):
    with pytest.raises(UserError, match="give a path, or one of a100, h100, h200"):
        load_hardware("h300")
    path = tmp_path / "mine.yaml"
    path.write_text((FOLDER / "h200.yaml").read_text() + "colour: red\n")
    with pytest.raises(UserError, match="colour"):
        load_hardware(str(path))


@pytest.mark.parametrize(
    ("card", "memory_gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100"),
        ("NVIDIA H100 PCIe", 79.2, None),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA GH200 480GB", 94.5, None),
        ("NVIDIA A100-SXM4-80GB", 79.2, None),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100"),
        ("NVIDIA A100 80GB PCIe", 79.2, None),
    ],
)
def test_a_card_is_described_by_the_file_of_its_own_kind_or_by_none(card, memory_gib, name):
    assert _name_of(card, int(memory_gib * 2**30)) == name
