"""One step of the groups against lightly's SMoGPrototypes: batch 4,096, 3,000 groups."""

import torch
import torch.nn.functional as F
from compare import claim, interleaved, parse_arguments
from lightly.models.modules.heads import SMoGPrototypes  # pyright: ignore
from torch import Tensor

from scale_smog.grouping import MomentumGroups

DIM, BETA = 128, 0.99


def unit(num: int, seed: int) -> Tensor:
    """[num, 128] unit rows."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num, DIM, generator=generator))


class GivenGroups(MomentumGroups):
    """Our groups with assignments that are already known."""

    given: Tensor

    def assign(self, z: Tensor) -> Tensor:
        return self.given


class GivenPrototypes(SMoGPrototypes):
    """lightly's groups with assignments that are already known."""

    given: Tensor

    def assign_groups(self, x: Tensor) -> Tensor:
        return self.given


def main() -> None:
    arguments = parse_arguments(__doc__)
    batch, num_groups = (512, 300) if arguments.quick else (4096, 3000)
    torch.set_num_threads(arguments.threads)
    start, z, weight = unit(num_groups, 0), unit(batch, 1), unit(num_groups, 2)

    groups, prototypes = MomentumGroups(num_groups, DIM), SMoGPrototypes(start.clone(), BETA)
    given, given_prototypes = GivenGroups(num_groups, DIM), GivenPrototypes(start.clone(), BETA)
    for ours in (groups, given):
        ours.centroids.copy_(start)
    given.given = given_prototypes.given = groups.assign(z)
    size = f"batch {batch}, K = {num_groups}, {arguments.threads} threads"
    print(f"{size}; {len(given.given.unique())} groups have features")

    # lightly leaves the groups without unit length; apart from that both define the same thing.
    difference = groups.updated_by(z, BETA) - F.normalize(prototypes.get_updated_group_features(z))
    print(f"  greatest difference of a group's value: {difference.abs().max():.1e}")
    assert difference.abs().max() < 1e-6

    with torch.no_grad():
        update = interleaved(
            {
                "ours: update": lambda: given.updated_by(z, BETA),
                "lightly: update": lambda: given_prototypes.get_updated_group_features(z),
            },
            arguments.repeats,
        )

    def backward(updated: Tensor) -> None:
        (updated * weight).sum().backward()

    x = z.clone().requires_grad_()
    step = interleaved(
        {
            "ours: assignment, update, backward": lambda: backward(groups.updated_by(x, BETA)),
            "lightly: assignment, update, backward": lambda: backward(
                prototypes.get_updated_group_features(x)
            ),
        },
        arguments.repeats,
    )
    claim(
        f"assignment, update and backward of the groups, s, against lightly; {size}", *step.values()
    )
    claim(f"update of the groups, s, against lightly; {size}", *update.values())


if __name__ == "__main__":
    main()
