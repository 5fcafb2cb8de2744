"""Groups that are updated in step with the nets."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks

from scale_smog import distributed
from scale_smog.errors import UserError
from scale_smog.grouping import FeatureBank, MomentumGroups
from scale_smog.grouping.precision import full_float32
from scale_smog.loss import group_contrastive_loss

NUM_GROUPS, DIM, BATCH, BETA = 12, 8, 24, 0.9
CPU = torch.device("cpu")


def unit(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def make_groups(operator: str = "momentum", **options) -> MomentumGroups:
    return MomentumGroups(NUM_GROUPS, DIM, operator, **options).double()


def plainly_updated(groups: MomentumGroups, z: torch.Tensor, beta: float, members) -> torch.Tensor:
    """The four operators of Table 7d, one group at a time."""
    ids, new = groups.assign(z), groups.centroids.clone()
    for k in range(NUM_GROUPS):
        mine = z[ids == k]
        if len(mine) == 0:
            continue
        mean = mine.mean(0)
        if groups.operator == "momentum":
            moved = beta * new[k] + (1 - beta) * mean
        elif groups.operator == "averaging":
            moved = new[k] + (mean - new[k]) / (members[k] + len(mine))
        else:
            moved = mean
        new[k] = moved / moved.norm()
    return new


@pytest.mark.parametrize("operator", ["momentum", "averaging", "adopt_latest"])
def test_an_update_equals_the_plain_loop_over_groups(operator):
    groups, members = make_groups(operator), torch.zeros(NUM_GROUPS)
    for step in range(5):
        z = unit(BATCH, DIM, seed=step)
        expected = plainly_updated(groups, z, BETA, members)
        members += torch.bincount(groups.assign(z), minlength=NUM_GROUPS)
        new = groups.updated_by(z, BETA)
        assert torch.allclose(new, expected, atol=1e-14)
        groups.commit(new)


def test_groups_without_features_keep_their_value_to_the_bit():
    groups, z = make_groups(), unit(2, DIM, seed=0)
    touched = groups.assign(z).unique()
    new = groups.updated_by(z, BETA)
    untouched = [k for k in range(NUM_GROUPS) if k not in touched]
    assert torch.equal(new[untouched], groups.centroids[untouched])
    assert not torch.equal(new[touched], groups.centroids[touched])


def test_averaging_counts_members_anew_after_a_reset():
    """G + (mean - G) / n with n of this update alone, as in the first one (Table 7d)."""
    bank = FeatureBank(1, BATCH, DIM, CPU)
    bank.push(unit(BATCH, DIM, seed=1).float())
    groups = MomentumGroups(NUM_GROUPS, DIM, "averaging")
    for step in range(3):
        groups.commit(groups.updated_by(unit(BATCH, DIM, seed=step).float(), beta=0.9))
    groups.reseed_from(bank)
    fresh = MomentumGroups(NUM_GROUPS, DIM, "averaging")
    fresh.centroids.copy_(groups.centroids)
    z = unit(BATCH, DIM, seed=9).float()
    assert torch.equal(groups.updated_by(z, beta=0.9), fresh.updated_by(z, beta=0.9))


def test_nothing_is_stored_before_commit():
    groups = make_groups()
    before = groups.centroids.clone()
    new = groups.updated_by(unit(BATCH, DIM, seed=0), BETA)
    assert torch.equal(groups.centroids, before)
    groups.commit(new)
    assert torch.equal(groups.centroids, new)


def test_random_select_takes_rows_of_the_latest_batch():
    groups, z = make_groups("random_select"), unit(BATCH, DIM, seed=0)
    first = groups.updated_by(z, BETA)
    assert ((first @ z.T).max(dim=1).values > 1 - 1e-12).all()
    groups.commit(first)
    assert not torch.equal(first, groups.updated_by(z, BETA))  # another draw at the next step


def test_groups_stay_float32_under_autocast():
    groups = MomentumGroups(NUM_GROUPS, DIM)
    z = unit(BATCH, DIM, seed=0).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert groups.updated_by(z, 0.999).dtype == torch.float32
        ids = groups.assign(z)
    assert torch.equal(ids, groups.assign(z))


def test_detached_groups_pass_no_gradient():
    z = unit(BATCH, DIM, seed=0).requires_grad_()
    assert make_groups(detach=True).updated_by(z, BETA).requires_grad is False
    assert make_groups().updated_by(z, BETA).requires_grad is True


def loss_and_gradient(z, p, ids, operator, differentiable=True):
    """On every rank: its part of the batch; the mean loss and the averaged gradient of it all."""
    rank, size = distributed.rank(), len(z) // distributed.world_size()
    part = slice(rank * size, (rank + 1) * size)
    if not differentiable:
        distributed.differentiable_all_reduce = lambda x: distributed.all_reduce(x.detach().clone())
    z, p = z[part].clone().requires_grad_(), p[part].clone().requires_grad_()
    groups = make_groups(operator).to(z.dtype)
    loss = group_contrastive_loss(p, groups.updated_by(z, BETA), ids[part], 0.1)
    (loss / distributed.world_size()).backward()  # an engine averages over the ranks
    gradient = z.grad if z.grad is not None else torch.zeros_like(z)
    return loss.item(), gradient, p.grad


@pytest.mark.parametrize("operator", ["momentum", "averaging", "adopt_latest", "random_select"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_gradient_over_ranks_equals_that_of_the_concatenated_batch(operator, world_size):
    z, p = unit(BATCH, DIM, seed=0), unit(BATCH, DIM, seed=1)
    ids = torch.arange(BATCH) % NUM_GROUPS
    loss, z_grad, p_grad = loss_and_gradient(z, p, ids, operator)
    ranks = run_on_ranks(world_size, loss_and_gradient, z, p, ids, operator)
    assert abs(sum(r[0] for r in ranks) / world_size - loss) < 1e-13
    for got, want in [(1, z_grad), (2, p_grad)]:
        joined = torch.cat([r[got] for r in ranks])
        assert (joined - want).norm() < 1e-12 * want.norm()
    assert z_grad.norm() > 1e-3  # the part through the groups is there


@pytest.mark.parametrize("world_size", [2, 3])
def test_in_float32_the_gradient_over_ranks_differs_by_rounding_only(world_size):
    z, p = unit(BATCH, DIM, seed=0).float(), unit(BATCH, DIM, seed=1).float()
    ids = torch.arange(BATCH) % NUM_GROUPS
    _, z_grad, p_grad = loss_and_gradient(z, p, ids, "momentum")
    ranks = run_on_ranks(world_size, loss_and_gradient, z, p, ids, "momentum")
    for got, want in [(1, z_grad), (2, p_grad)]:
        joined = torch.cat([r[got] for r in ranks])
        assert (joined - want).norm() < 1e-6 * want.norm()


def test_without_a_differentiable_reduction_the_part_through_the_groups_is_lost():
    z, p = unit(BATCH, DIM, seed=0), unit(BATCH, DIM, seed=1)
    ids = torch.arange(BATCH) % NUM_GROUPS
    ranks = run_on_ranks(2, loss_and_gradient, z, p, ids, "momentum", False)
    assert all(r[1].norm() == 0 for r in ranks)


@pytest.mark.parametrize("operator", ["momentum", "averaging", "adopt_latest", "random_select"])
def test_the_gradient_of_an_update_is_that_of_finite_differences(operator):
    groups = make_groups(operator)
    z = unit(6, DIM, seed=0).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: groups.updated_by(z, BETA), z)


def check_gradient_over_ranks():
    """Finite differences of this rank's features; the other ranks hold still, yet take part."""
    groups, z = make_groups(), unit(4, DIM, seed=distributed.rank())
    weight = unit(NUM_GROUPS, DIM, seed=9)

    def loss(mine):
        return (groups.updated_by(mine, BETA) * weight).sum()

    mine = z.clone().requires_grad_()
    loss(mine).backward()
    step, numeric = 1e-6, torch.zeros_like(z)
    for i in range(z.numel()):
        for sign in (1, -1):
            moved = z.clone()
            if distributed.rank() == 0:
                moved.view(-1)[i] += sign * step
            # Every rank has the same loss of the same groups: theirs all move with rank 0's z.
            total = distributed.all_reduce(loss(moved).detach())
            numeric.view(-1)[i] += sign * total / (2 * step)
    return mine.grad, numeric


def test_the_gradient_over_ranks_is_that_of_finite_differences():
    gradient, numeric = run_on_ranks(2, check_gradient_over_ranks)[0]
    assert (gradient - numeric).norm() < 1e-7 * numeric.norm()
    assert numeric.norm() > 1e-3


def reduce_and_check():
    """On every rank: a sum over ranks, and the gradient of this rank's part of a loss on it."""
    own = torch.full((3,), 1.0 + distributed.rank(), dtype=torch.float64, requires_grad=True)
    weight = torch.arange(3, dtype=torch.float64) + distributed.rank()
    total = distributed.differentiable_all_reduce(own)
    (total.square() * weight).sum().backward()
    return total.detach(), own.grad


def test_the_gradient_of_a_sum_over_ranks_is_the_sum_of_all_ranks_gradients():
    ranks = run_on_ranks(2, reduce_and_check)
    total = torch.full((3,), 3.0, dtype=torch.float64)
    both_weights = 2 * torch.arange(3, dtype=torch.float64) + 1
    for got, gradient in ranks:
        assert torch.equal(got, total)
        assert torch.equal(gradient, 2 * total * both_weights)


def cluster_bank(rows):
    """Every rank fills its part of a bank, draws seeds, clusters, then resets once more."""
    rank, world_size = distributed.rank(), distributed.world_size()
    size = rows.shape[1] // world_size
    bank = FeatureBank(3, size, DIM, CPU)
    for step in rows:
        bank.push(step[rank * size : (rank + 1) * size])
    groups = MomentumGroups(NUM_GROUPS, DIM, seed=3)
    groups.start_from(bank)
    first = groups.centroids.clone()
    report = groups.reseed_from(bank)
    return first, groups.centroids, report, bank.state_dict()["ring"].values


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_first_groups_and_resets_are_the_same_bits_at_any_number_of_ranks(world_size):
    rows = torch.stack([unit(BATCH, DIM, seed=s).float() for s in range(5)])  # two are overwritten
    alone = cluster_bank(rows)
    ranks = run_on_ranks(world_size, cluster_bank, rows)
    for rank in ranks:
        assert torch.equal(rank[0], alone[0])
        assert torch.equal(rank[1], alone[1])
        assert rank[2] == alone[2]
    assert torch.equal(torch.cat([rank[3] for rank in ranks]), alone[3])


def test_first_groups_are_drawn_from_different_features():
    rows = unit(BATCH, DIM, seed=0).float()
    bank = FeatureBank(1, BATCH, DIM, CPU)
    bank.push(rows)
    groups = MomentumGroups(NUM_GROUPS, DIM, kmeans_iterations=0)
    groups.start_from(bank)
    similarity = groups.centroids @ rows.T
    assert (similarity.max(dim=1).values > 1 - 1e-6).all()
    assert len(similarity.argmax(dim=1).unique()) == NUM_GROUPS


def test_fewer_features_than_groups_are_refused():
    bank = FeatureBank(1, BATCH, DIM, CPU)
    bank.push(unit(BATCH, DIM, seed=0).float())
    with pytest.raises(UserError, match=f"{BATCH} features for {BATCH + 1} groups"):
        MomentumGroups(BATCH + 1, DIM).start_from(bank)


def test_the_bank_holds_exactly_the_last_steps():
    bank = FeatureBank(3, 2, 1, CPU)
    for step in range(5):
        bank.push(torch.full((2, 1), float(step)))
        kept = sorted(set(bank.features().flatten().tolist()))
        assert kept == [float(s) for s in range(max(0, step - 2), step + 1)]


def restore_bank(ring):
    size = BATCH // distributed.world_size()
    bank = FeatureBank(3, size, DIM, CPU)
    own = ring[distributed.rank() * size :][:size]
    bank.load_state_dict({"ring": own, "num_pushed": torch.tensor(5)})
    bank.push(unit(BATCH, DIM, seed=9).float()[:size] * 0)
    groups = MomentumGroups(NUM_GROUPS, DIM, seed=3)
    groups.reseed_from(bank)
    return groups.centroids


def test_a_bank_restored_on_another_number_of_ranks_clusters_to_the_same_bits():
    rows = torch.stack([unit(BATCH, DIM, seed=s).float() for s in range(5)])
    saved = torch.cat([rank[3] for rank in run_on_ranks(4, cluster_bank, rows)])
    alone = restore_bank(saved)
    for world_size in (2, 3):
        ranks = run_on_ranks(world_size, restore_bank, saved)
        assert all(torch.equal(alone, centroids) for centroids in ranks)


def test_uniform_predictions_lose_the_chance_level():
    groups = torch.eye(NUM_GROUPS)
    p = F.normalize(torch.ones(3, BATCH, NUM_GROUPS), dim=-1)
    loss = group_contrastive_loss(p, groups, torch.zeros(BATCH, dtype=torch.int64), 0.1)
    assert abs(loss.item() - math.log(NUM_GROUPS)) < 1e-5


def test_every_view_of_an_image_has_the_same_target():
    groups, p = unit(NUM_GROUPS, DIM, seed=0), unit(3, BATCH, DIM, seed=1)
    ids = torch.arange(BATCH) % NUM_GROUPS
    one_by_one = torch.stack([group_contrastive_loss(view, groups, ids, 0.1) for view in p])
    assert torch.allclose(group_contrastive_loss(p, groups, ids, 0.1), one_by_one.mean())


def test_reduced_matmul_precision_reaches_no_assignment():
    """Whatever precision a user sets for the nets, inside it is the highest, and outside theirs."""
    torch.set_float32_matmul_precision("medium")
    try:
        with full_float32(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
