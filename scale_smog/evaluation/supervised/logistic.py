"""Multinomial logistic regression to convergence, the minimum of scikit-learn's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_smog import distributed

MAX_LBFGS_STEPS = 2000


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
    mean, basis = _preconditioner(z.double(), inverse_penalty)
    own_z, own_y = (z[rank::world_size].double() - mean) @ basis, y[rank::world_size]  # [n, F]
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


def _preconditioner(z: Tensor, inverse_penalty: float) -> tuple[Tensor, Tensor]:
    """Mean [F] and basis [F, F] of features [N, F] in which the objective is nearly round.

    Its curvature along an eigenvector of the covariance is about p (1 - p) λ of the data, p (1 - p)
    being a tenth or so, and 1 / (C N) of the penalty. A change of basis leaves the minimum alone.
    """
    mean = z.mean(dim=0)
    values, vectors = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))
    return mean, vectors * (values.clamp(min=0) + 10 / (inverse_penalty * len(z))).rsqrt()
