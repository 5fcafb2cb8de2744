"""The loop of every evaluation that trains: data parallel, resumable, plain torch."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from scale_smog import distributed
from scale_smog.errors import UserError
from scale_smog.evaluation.task import EvaluationTask

LOG_EVERY = 20  # steps
LR_BATCH = 256  # images that a learning rate is meant for
MOMENTUM = 0.9  # of SGD, in every protocol


@dataclass(frozen=True)
class Training:
    """What to train, and how.

    Attributes:
        net: trained and saved; on its device.
        optimizer: of its parameters; the groups' learning rates are the highest ones.
        lr_factor: on them at a step.
        loss: this rank's mean loss of a batch, of the net wrapped for several ranks.
        num_steps: all of them.
        checkpoint_every: steps.
    """

    net: nn.Module
    optimizer: torch.optim.Optimizer
    lr_factor: Callable[[int], float]
    loss: Callable[[nn.Module, Any], Tensor]
    num_steps: int
    checkpoint_every: int


def train(
    task: EvaluationTask, name: str, training: Training, batches: Callable[[range], Iterable[Any]]
) -> None:
    """Trains to the end, or on from where an earlier call was interrupted; a collective.

    Args:
        task: whose folder keeps the progress.
        name: of this training within the task.
        training: changed in place.
        batches: of a range of steps.

    Raises:
        UserError: the loss is not a number.
    """
    net, optimizer = training.net, training.optimizer
    step = _restore(task, name, net, optimizer)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    if step == 0:
        distributed.broadcast_module(net)
    wrapped = _wrap(net, task.device)
    shown = None if distributed.is_main() else True  # None: where there is a terminal
    bar = tqdm(total=training.num_steps, initial=step, desc=f"{task.name} {name}", disable=shown)
    for batch in batches(range(step, training.num_steps)):
        for group, lr in zip(optimizer.param_groups, peak_lrs, strict=True):
            group["lr"] = lr * training.lr_factor(step)
        # Dropout and sampled boxes: a resumed training draws the same.
        torch.manual_seed(step * distributed.world_size() + distributed.rank())
        loss = training.loss(wrapped, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        bar.update()
        if step % LOG_EVERY == 0 or step in (1, training.num_steps):
            _log(task, name, step, loss)
        if step % training.checkpoint_every == 0 or step == training.num_steps:
            # The peak rates are saved: a resumed run takes its factor from the step again.
            for group, lr in zip(optimizer.param_groups, peak_lrs, strict=True):
                group["lr"] = lr
            state = {"step": step, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
            task.save_progress(name, state)
    bar.close()
    distributed.barrier()


def cosine(step: int, num_steps: int) -> float:
    """Falls from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _restore(
    task: EvaluationTask, name: str, net: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    state = task.load_progress(name)
    if state is None:
        return 0
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    if distributed.is_main():
        print(f"{task.name} {name}: going on after step {state['step']}", flush=True)
    return state["step"]


def _wrap(net: nn.Module, device: torch.device) -> nn.Module:
    if distributed.world_size() == 1:
        return net
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(net, device_ids=ids)


def _log(task: EvaluationTask, name: str, step: int, loss: Tensor) -> None:
    """The only place where the host waits for a loss."""
    mean = distributed.all_reduce(loss.detach().clone()).item() / distributed.world_size()
    if not math.isfinite(mean):
        raise UserError(f"{task.name} {name}: the loss is {mean} after step {step}: lower the rate")
    task.log({"training": name, "step": step, "loss": mean})
