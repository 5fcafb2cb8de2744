"""Multinomial logistic regression to convergence, the minimum of scikit-learn's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_smog import distributed

MAX_LBFGS_STEPS = 2000
ROWS_AT_ONCE = 2**15


def fit_logistic(
    z: Tensor, y: Tensor, num_classes: int, inverse_penalty: float
) -> tuple[Tensor, Tensor]:
    """Weight [C, F] and bias [C] float64 of the classifier, by L-BFGS; a collective.

    The objective is the mean loss + ‖w‖² / (2 C N), which has the minimum of scikit-learn's
    `LogisticRegression(C=C)`; the bias is not penalised.

    Args:
        z: features [N, F], the same on all ranks, each of which takes its part.
        y: classes [N] int64.
        num_classes: of the classifier.
        inverse_penalty: C.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    own_z, own_y = z[rank::world_size], y[rank::world_size]  # [n, F], [n]
    mean, basis = _preconditioner(own_z, len(z), inverse_penalty)
    rows = own_z.split(ROWS_AT_ONCE)
    own_z = torch.cat([(x.double() - mean) @ basis for x in rows])  # [n, F]
    weight = torch.zeros(num_classes, z.shape[1], dtype=torch.float64, device=z.device)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=z.device)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=MAX_LBFGS_STEPS,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        optimizer.zero_grad()
        logits = F.linear(own_z, weight, bias)
        loss = F.cross_entropy(logits, own_y, reduction="sum") / len(z)
        penalty = (weight @ basis.T).square().sum() / (2 * inverse_penalty * len(z))
        (loss + penalty / world_size).backward()  # summed over ranks, it counts once
        for parameter in parameters:
            assert parameter.grad is not None
            distributed.all_reduce(parameter.grad)
        return distributed.all_reduce((loss + penalty / world_size).detach()).item()

    optimizer.step(objective)
    weight = weight.detach() @ basis.T
    return weight, bias.detach() - weight @ mean


def _preconditioner(own_z: Tensor, num_rows: int, inverse_penalty: float) -> tuple[Tensor, Tensor]:
    """Mean [F] and basis [F, F] of features in which the objective is nearly round; a collective.

    Its curvature along an eigenvector of the covariance is about p (1 - p) λ of the data, p (1 - p)
    being a tenth or so, and 1 / (C N) of the penalty. A change of basis leaves the minimum alone.

    Args:
        own_z: this rank's [n, F].
        num_rows: N, of all ranks.
        inverse_penalty: C.
    """
    mean = distributed.all_reduce(own_z.sum(dim=0, dtype=torch.float64)) / num_rows
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for rows in own_z.split(ROWS_AT_ONCE):  # all of them in float64 would fill a GPU
        centred = rows.double() - mean
        covariance += centred.T @ centred / num_rows
    values, vectors = torch.linalg.eigh(distributed.all_reduce(covariance))
    basis = vectors * (values.clamp(min=0) + 10 / (inverse_penalty * num_rows)).rsqrt()
    # Rank 0's for all: another kind of processor may find other vectors.
    return mean, distributed.all_reduce(basis * distributed.is_main())
