"""The alpha-beta model: what collectives take, and what of it a step waits for."""

import math

import pytest

from scale_smog.config import Recipe
from scale_smog.profiling.communication_model import (
    CommunicationModel,
    exposed_s,
    finish_s,
    fit_alpha_beta,
)
from scale_smog.profiling.hardware import load_hardware
from scale_smog.profiling.workload import Workload, estimate_parts

H200 = load_hardware("h200")


def recipe_of(**sections) -> Recipe:
    return Recipe.model_validate({"run": {"epochs": 1}, "data": {"path": ""}} | sections)


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload.of(recipe_of(), 64)


def test_a_bucket_waits_for_its_gradients_and_for_the_bucket_before_it():
    assert finish_s([(1.0, 0.5), (2.0, 0.5)]) == 2.5  # the link was free
    assert finish_s([(1.0, 3.0), (2.0, 0.5)]) == 4.5  # it was not


def test_an_all_reduce_over_nodes_costs_the_ring_within_and_the_ring_between():
    model = CommunicationModel(H200, 1)
    num_bytes = 1.5e9  # ResNet-50 x4 in float32
    ring = 2 * 7 / 8 * num_bytes / 420e9 + 2 * 7 / 8 * num_bytes / 8 / 42e9
    assert model.seconds("all_reduce", num_bytes, 64) == pytest.approx(ring, rel=0.02)
    assert model.seconds("all_reduce", num_bytes, 1) == 0


def test_gradients_in_bf16_halve_what_ddp_sends(work):
    slow = H200.model_copy(update={"overlap": (0.0, 0.0, 0.0)})
    halved = Workload(recipe_of(engine={"reduce_precision": "bf16"}), 64, work.cost)
    parts = estimate_parts(work, slow, 1)
    full = exposed_s(work, parts, 64, "ddp", "node", slow, 1)["weights"]
    assert exposed_s(halved, parts, 64, "ddp", "node", slow, 1)["weights"] < 0.6 * full


def test_latency_and_bandwidth_come_back_from_the_times_they_make():
    points = [(size, 20e-6 + size / 2e9) for size in (1_000, 10_000, 1_000_000, 50_000_000)]
    alpha, beta = fit_alpha_beta(points)
    assert alpha == pytest.approx(20e-6, rel=1e-6) and beta == pytest.approx(0.5e-9, rel=1e-6)


def test_batch_norms_of_one_net_hide_behind_the_other_where_the_nets_are_whole(work):
    parts = estimate_parts(work, H200, 1)

    def waits_s(engine: str, overlap: float) -> float:
        machine = H200.model_copy(update={"overlap": (overlap,) * 3})
        return exposed_s(work, parts, 64, engine, "global", machine, 1)["batch_norm"]

    assert waits_s("ddp", 0.9) < 0.75 * waits_s("ddp", 0.0)
    assert waits_s("fsdp", 0.9) == waits_s("fsdp", 0.0) == waits_s("ddp", 0.0)


@pytest.mark.parametrize(("backbone", "num_units"), [("resnet18", 7), ("vit_tiny_patch16_224", 15)])
def test_split_weights_wait_for_a_message_a_unit_under_fsdp_and_a_bucket_under_zero3(
    backbone, num_units
):
    work = Workload.of(recipe_of(model={"backbone": backbone}), 8)
    assert work.num_weights < 50e6  # one bucket
    parts = estimate_parts(work, H200, 1)
    network = H200.network.model_copy(update={"latency_us": (1e6,) * 3})
    slow = H200.model_copy(update={"network": network, "overlap": (0.0,) * 3})
    fsdp, zero3 = (
        exposed_s(work, parts, 64, engine, "local", slow, 1)["weights"] - math.log2(8)  # norms
        for engine in ("fsdp", "zero3")
    )
    # Three gathers and a reduce-scatter; DeepSpeed keeps weights for the pass backward.
    assert fsdp / num_units == pytest.approx(4 * math.log2(8), rel=0.01)
    assert zero3 == pytest.approx(3 * math.log2(8), rel=0.01)
