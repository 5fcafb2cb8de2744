"""A linear classifier on frozen features: several learning rates on one forward pass."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_smog import distributed
from scale_smog.data.batch import Batch
from scale_smog.data.image_folder import Images
from scale_smog.evaluation.checkpoints import Embed
from scale_smog.evaluation.features import embed_images
from scale_smog.evaluation.job import Job
from scale_smog.evaluation.protocols import LinearConfig
from scale_smog.evaluation.splits import held_out_share, random_subset
from scale_smog.evaluation.supervised.classifiers import RATE_BATCH, accuracies, crops
from scale_smog.evaluation.supervised.training import Training, cosine, train

MAX_LBFGS_STEPS = 2000


class Heads(nn.Module):
    """L linear classifiers of the same features, one matrix product for all of them.

    Args:
        num_heads: L.
        num_features: F.
        num_classes: C.
    """

    def __init__(self, num_heads: int, num_features: int, num_classes: int) -> None:
        super().__init__()
        shape = (num_classes, num_features)
        self.weights = nn.ParameterList(torch.zeros(shape) for _ in range(num_heads))
        self.biases = nn.ParameterList(torch.zeros(num_classes) for _ in range(num_heads))

    def forward(self, features: Tensor) -> Tensor:
        """Scores [B, L, C] of features [B, F]."""
        weight, bias = torch.cat(list(self.weights)), torch.cat(list(self.biases))  # [L * C, F]
        return F.linear(features, weight, bias).unflatten(1, (len(self.weights), -1))


def evaluate_linear(
    job: Job, name: str, embed: Embed, train_set: Images, test_set: Images
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of the linear classifier on one frozen net; a collective.

    Args:
        job: settings and folder.
        name: of the net within the job.
        embed: images [B, 3, H, W] -> features [B, F].
        train_set: labelled images to train on.
        test_set: labelled images to judge on.

    Raises:
        UserError: the ranks do not divide the batch.
    """
    config = job.protocols.linear
    test_ids = random_subset(test_set.num_samples, job.recipe.evaluation.num_test_images)
    if config.setting == "logistic":
        head = _fit_logistic(job, embed, train_set, np.arange(train_set.num_samples))
        ((top1, top5),) = accuracies(job, _scores(embed, head), test_set, test_ids)
        return {"top1": top1, "top5": top5, "inverse_penalty": config.inverse_penalty}

    rates = config.learning_rates
    train_ids, held_out = np.arange(train_set.num_samples), np.zeros(0, dtype=np.int64)
    if len(rates) > 1:
        train_ids, held_out = held_out_share(train_set.labels, config.held_out, config.seed)
    heads = _train_heads(job, name, embed, train_set, train_ids)
    by_rate = accuracies(job, _scores(embed, heads), test_set, test_ids)
    chosen, figures = 0, {}
    if len(rates) > 1:
        on_held_out = accuracies(job, _scores(embed, heads), train_set, held_out)
        chosen = max(range(len(rates)), key=lambda i: on_held_out[i])
        figures = {
            f"top1_at_{rate:g}": top1 for rate, (top1, _) in zip(rates, by_rate, strict=True)
        }
    top1, top5 = by_rate[chosen]
    return {"top1": top1, "top5": top5, "learning_rate": rates[chosen], **figures}


def build_heads(
    config: LinearConfig, num_features: int, num_classes: int, device: torch.device
) -> tuple[Heads, torch.optim.SGD]:
    """A classifier for each learning rate, and the optimizer that gives each its own."""
    heads = Heads(len(config.learning_rates), num_features, num_classes).to(device)
    groups = [
        {"params": [weight, bias], "lr": rate * config.batch / RATE_BATCH}
        for weight, bias, rate in zip(
            heads.weights, heads.biases, config.learning_rates, strict=True
        )
    ]
    optimizer = torch.optim.SGD(
        groups,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    return heads, optimizer


def _train_heads(job: Job, name: str, embed: Embed, dataset: Images, ids: np.ndarray) -> Heads:
    config = job.protocols.linear
    batches, num_steps = crops(job, dataset, ids, config)
    num_features = embed(_one_image(job)).shape[1]
    heads, optimizer = build_heads(config, num_features, dataset.num_classes, job.device)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        scores = net(embed(batch.large[0]).float())  # [B, L, C]
        labels = batch.label.to(job.device)[:, None].expand(scores.shape[:2])  # [B, L]
        # The mean over B x L times L: every head's gradient is that of its own mean loss.
        return F.cross_entropy(scores.flatten(0, 1), labels.flatten()) * scores.shape[1]

    rate = partial(cosine, num_steps=num_steps)
    training = Training(heads, optimizer, rate, loss, num_steps, config.checkpoint_every)
    train(job, name, training, batches)
    return heads


def _fit_logistic(job: Job, embed: Embed, dataset: Images, ids: np.ndarray) -> nn.Module:
    """The minimum of C Σ loss + ‖w‖² / 2 on centre crops, by L-BFGS over all ranks."""
    recipe, config = job.recipe, job.protocols.linear
    z = embed_images(embed, recipe.data, recipe.evaluation, dataset, ids, job.device)
    y = torch.from_numpy(dataset.labels[ids]).to(job.device)
    return fit_logistic(z, y, dataset.num_classes, config.inverse_penalty)


def fit_logistic(z: Tensor, y: Tensor, num_classes: int, inverse_penalty: float) -> Heads:
    """Multinomial logistic regression to convergence; a collective.

    The objective is the mean loss + ‖w‖² / (2 C N), which has the minimum of scikit-learn's
    `LogisticRegression(C=C)`; the bias is not penalised.

    Args:
        z: features [N, F], the same on all ranks, each of which takes its part.
        y: classes [N] int64.
        num_classes: of the classifier.
        inverse_penalty: C.

    Returns:
        One head, in float64.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    mean, basis = _round_valley(z.double(), inverse_penalty)
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
        scores = F.linear(own_z, weight, bias)
        loss = F.cross_entropy(scores, own_y, reduction="sum") / len(z)
        penalty = (weight @ basis.T).square().sum() / (2 * inverse_penalty * len(z))
        (loss + penalty / world_size).backward()  # summed over ranks, it counts once
        for parameter in parameters:
            assert parameter.grad is not None
            distributed.all_reduce(parameter.grad)
        return distributed.all_reduce((loss + penalty / world_size).detach()).item()

    optimizer.step(objective)
    head = Heads(1, z.shape[1], num_classes).double().to(z.device)
    with torch.no_grad():
        head.weights[0].copy_(weight @ basis.T)
        head.biases[0].copy_(bias - weight @ basis.T @ mean)
    return head


def _round_valley(z: Tensor, inverse_penalty: float) -> tuple[Tensor, Tensor]:
    """Mean [F] and basis [F, F] of features [N, F] in which the objective is nearly round.

    Its curvature along an eigenvector of the covariance is about p (1 - p) λ of the data, p (1 - p)
    being a tenth or so, and 1 / (C N) of the penalty. A change of basis leaves the minimum alone.
    """
    mean = z.mean(dim=0)
    values, vectors = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))
    return mean, vectors * (values.clamp(min=0) + 10 / (inverse_penalty * len(z))).rsqrt()


def _scores(embed: Embed, heads: nn.Module):
    dtype = next(heads.parameters()).dtype
    return lambda images: heads(embed(images).to(dtype))


def _one_image(job: Job) -> Tensor:
    px = job.recipe.evaluation.image_px
    return torch.zeros(1, 3, px, px, device=job.device)
