"""Whether many ranks compute what one rank computes on the same global batch.

Nets first: a run of all ranks against one of a single rank, within rounding. Then groups, bank and
k-means on the features of that run, to the bit: the features are put on a grid whose sums float64
holds exactly.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

GRID = 2.0**20  # a feature is a whole multiple of 1 / GRID: 2^33 of them sum up without rounding
BETA = 0.75
# Largest difference of any value of groups and bank from the other run's: the bank is float32.
TOLERANCE = {"fp64": 1e-7, "fp32": 1e-4}


def precision_of(engine: str) -> str:
    """The ZeRO engines have no fp64."""
    return "fp32" if engine.startswith("zero") else "fp64"


def differences(run: Path, other: Path) -> dict[str, float]:
    """Largest difference of any value, for each part of two runs' newest checkpoints."""
    one, two = (newest_state(path) for path in (run, other))
    assert one.keys() == two.keys()
    found: dict[str, float] = {}
    for name, value in one.items():
        part = name.split(".")[0]
        difference = (value.double() - two[name].double()).abs().max().item()
        found[part] = max(found.get(part, 0.0), difference)
    return found


def newest_state(run: Path) -> dict[str, Tensor]:
    """All tensors of a run's newest checkpoint."""
    from scale_smog import checkpoint

    return checkpoint.load(checkpoint.list_checkpoints(run)[-1])[0]


def unequal(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many tensors two outcomes have, and the names of those that have not the same bits."""
    first, second = torch.load(one), torch.load(other)
    assert first.keys() == second.keys()
    return len(first), [name for name in first if not torch.equal(first[name], second[name])]


def group_features(run: Path, out: Path) -> Callable[[int], None]:
    """What a rank does: takes the features of a run's bank through all that groups do.

    Rank 0 leaves the outcome in the file `out`.
    """

    def work(rank: int) -> None:
        del rank
        from scale_smog import distributed

        with distributed.process_group():
            ring = newest_state(run)["bank.ring"].transpose(0, 1)  # [S, global batch, D]
            outcome = _through_groups((ring * GRID).round() / GRID)
            digest = hashlib.sha256(str([x.tolist() for x in outcome.values()]).encode())
            digests = distributed.gather_objects(digest.hexdigest())
            assert len(set(digests)) == 1, "ranks differ"
            if distributed.is_main():
                torch.save(outcome, out)
        distributed.end_process()

    return work


def _through_groups(ring: Tensor) -> dict[str, Tensor]:
    """k-means from random rows, an update a step of the ring, k-means from the groups.

    Args:
        ring: features [S, global batch, D] of all ranks.
    """
    from scale_smog import distributed
    from scale_smog.grouping import FeatureBank, MomentumGroups

    num_steps, _, dim = ring.shape
    own = ring.chunk(distributed.world_size(), dim=1)[distributed.rank()]  # [S, B, D]
    bank = FeatureBank(num_steps, own.shape[1], dim, torch.device("cpu"))
    groups = MomentumGroups(10, dim).double()
    for features in own:
        bank.push(features)
    start = groups.start_from(bank)
    found = {"first groups": groups.centroids.clone(), "first sizes": start.counts}
    for number, features in enumerate(own.double()):
        z = features.clone().requires_grad_()
        moved = groups.updated_by(z, BETA)
        weight = torch.arange(moved.numel()).view_as(moved) / GRID * distributed.is_main()
        moved.backward(weight)  # every rank's gradient adds up: the others' are zero
        assert z.grad is not None
        found[f"gradient {number}"] = distributed.gather_columns(z.grad[None])[0]
        groups.commit(moved.detach())
        found[f"groups {number}"], found[f"sizes {number}"] = moved.detach(), groups.counts
    report = groups.reseed_from(bank)
    found["last groups"] = groups.centroids.clone()
    found["last report"] = torch.tensor([report.inertia, report.drift, float(report.num_splits)])
    found["bank"] = distributed.gather_columns(bank.state_dict()["ring"].values.transpose(0, 1))
    return found
