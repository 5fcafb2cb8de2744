"""Quality of features without labels: effective rank, uniformity and alignment.

Each is a few small products; only the eigenvalues are found on the host.
"""

import torch
from torch import Tensor

from scale_smog import distributed

EPSILON = 1e-7  # RankMe's
RANK_ROWS = 2048  # of a rank; the effective rank of D dimensions needs several D rows
PAIR_ROWS = 512  # of a rank: 130,000 pairs


@torch.no_grad()
def effective_rank(rows: Tensor) -> float:
    """RankMe: exp of the entropy of the singular values' shares (Garrido et al., ICML 2023, Eq. 1).

    1 when all features lie on a line, at most min(N, D) when they fill all dimensions alike. A
    collective; the value is rank 0's, and 0 on the other ranks.

    Args:
        rows: features of this rank [n, D]; N over all ranks. Evenly spaced ones are taken where
            there are many.
    """
    rows = _spaced(rows, RANK_ROWS).double()
    gram = distributed.all_reduce(rows.T @ rows)  # [D, D]; in float64: roots follow
    return _rank_of_gram(gram) if distributed.is_main() else 0.0


@torch.no_grad()
def effective_rank_of_few(rows: Tensor, num_rows: int) -> float:
    """`effective_rank` of at most `num_rows` rows over all ranks: where D is in the thousands.

    The products of the rows with one another have the same singular values as those of the
    dimensions, and there are fewer. A collective; 0 on the other ranks.

    Args:
        rows: features of this rank [n, D], equally many on all.
        num_rows: over all ranks, at least one each.
    """
    own = max(1, num_rows // distributed.world_size())
    few = distributed.gather_columns(_spaced(rows, own)[None])[0].double()  # [N, D]
    return _rank_of_gram(few @ few.T) if distributed.is_main() else 0.0


@torch.no_grad()
def uniformity(rows: Tensor) -> Tensor:
    """log of the mean of exp(-2 |x - y|^2) over pairs (Wang and Isola, ICML 2020, Eq. 3).

    -4 is the least in many dimensions, 0 a single point. A collective that does not wait.

    Args:
        rows: unit features of this rank [n, D]; pairs are those within a rank.

    Returns:
        [] float32, the same on every rank; NaN where ranks have one row each.
    """
    rows = _spaced(rows, PAIR_ROWS).float()
    kernel = torch.exp(4 * (rows @ rows.T) - 4)  # [n, n]: |x - y|^2 = 2 - 2 x.y
    num = len(rows)
    mean = (kernel.sum() - kernel.diagonal().sum()) / (num * (num - 1))
    return (distributed.all_reduce(mean) / distributed.world_size()).log()


def _spaced(rows: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spaced."""
    return rows[:: -(-len(rows) // most)] if len(rows) else rows


def _rank_of_gram(gram: Tensor) -> float:
    values = torch.linalg.eigvalsh(gram.cpu()).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=EPSILON) + EPSILON  # a sum of 0 has rank 1
    return torch.exp(-(shares * shares.log()).sum()).item()
