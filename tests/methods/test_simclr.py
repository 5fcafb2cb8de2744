"""SimCLR: its loss over all ranks, with the gradient of one batch; its step as SMoG's start."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from small_recipe import small_recipe

from scale_smog import UserError, checkpoint, distributed
from scale_smog.methods.simclr import nt_xent_loss
from scale_smog.pretrain import pretrain


def views(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(2, batch, 8, generator=generator), dim=-1)


def written_out(p: torch.Tensor, temperature: float) -> torch.Tensor:
    """SimCLR's Eq. 1, view by view."""
    flat, batch = p.flatten(0, 1), p.shape[1]
    losses = []
    for i, z in enumerate(flat):
        other = (i + batch) % (2 * batch)
        others = [j for j in range(2 * batch) if j != i]
        scores = torch.stack([z @ flat[j] for j in others]) / temperature
        losses.append(scores.logsumexp(0) - z @ flat[other] / temperature)
    return torch.stack(losses).mean()


def test_it_is_simclrs_equation():
    p = views(5)
    torch.testing.assert_close(nt_xent_loss(p, 0.3), written_out(p, 0.3))


def on_a_rank(batch: int) -> tuple[float, torch.Tensor]:
    whole = views(batch).requires_grad_()
    share = batch // distributed.world_size()
    first = distributed.rank() * share
    loss = nt_xent_loss(whole[:, first : first + share], 0.2)
    loss.backward()
    assert whole.grad is not None
    # An engine averages gradients over ranks.
    grad = distributed.all_reduce(whole.grad.clone()) / distributed.world_size()
    return (distributed.all_reduce(loss.detach()) / distributed.world_size()).item(), grad


def test_ranks_have_all_ranks_images_as_negatives_and_the_gradient_of_one_batch():
    p = views(6).requires_grad_()
    loss = nt_xent_loss(p, 0.2)
    loss.backward()
    for of_ranks, grad in run_on_ranks(3, on_a_rank, 6):
        assert of_ranks == pytest.approx(loss.item(), abs=1e-6)
        torch.testing.assert_close(grad, p.grad)


def test_groups_rest_in_the_warm_up_and_are_made_anew_at_its_end(tmp_path, tars):
    keys = ("grouping.instance_warmup_steps=4", "run.checkpoint_every=1", "run.steps=6")
    pretrain(small_recipe(tmp_path, tars, *keys))
    groups, pushed = {}, {}
    for folder in checkpoint.list_checkpoints(tmp_path / "run"):
        tensors, facts = checkpoint.load(folder)
        step = facts["step"]
        groups[step] = tensors["groups.centroids"].clone()
        pushed[step] = tensors["usage.num_pushed"].item()
    assert torch.equal(groups[1], groups[4])
    moved = (groups[4] * groups[5]).sum(1)
    assert (moved < 0.9).any()  # not the first net's groups, a step on
    assert [pushed[step] for step in (4, 5, 6)] == [0, 1, 2]

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # no NaN
    assert [math.exp(line["chance_loss"]) for line in logged] == pytest.approx([23] * 4 + [10] * 2)
    assert ["group_perplexity" in line for line in logged] == [False] * 4 + [True] * 2


def test_a_warm_up_too_short_to_make_groups_of_is_refused(tmp_path, tars):
    with pytest.raises(UserError, match="instance_warmup_steps=1 leaves fewer features"):
        small_recipe(
            tmp_path, tars, "grouping.instance_warmup_steps=1", "grouping.num_groups=20",
            "grouping.bank_steps=2",
        )  # fmt: skip
