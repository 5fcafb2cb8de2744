"""Training with this framework against lightly's SMoG example, loading and k-means included.

    python benchmarks/framework.py IMAGES [--quick] [--threads N] [--repeats N]

IMAGES is an image folder, such as CIFAR-10's. Both sides train the example's own setting on it:
torchvision's ResNet-18, batches of 256 images of 32 px, two views, SGD, 300 groups, a reset by
k-means over the last 300 steps' features every 300 steps. Ours loads with DALI and, for its best,
with the loader that keeps a small set decoded, which the peer lacks. The peer is the loop that
lightly's example has, made of lightly's modules and transforms. A step's time holds a 300th of a
reset's. Needs `lightly`.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare import claim, interleaved, interleaved_streams, parse_arguments
from lightly.models import utils  # pyright: ignore
from lightly.models.modules import SMoGPredictionHead, SMoGProjectionHead, SMoGPrototypes  # pyright: ignore
from lightly.models.modules.memory_bank import MemoryBankModule  # pyright: ignore
from lightly.transforms import SMoGTransform  # pyright: ignore
from sklearn.cluster import KMeans
from step import one_rank
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

from scale_smog.config import Recipe
from scale_smog.data.prepare.shard import shard_folder
from scale_smog.loop import train_step
from scale_smog.methods.smog import Smog
from scale_smog.profiling.timing import synchronize
from scale_smog.state import build_state
from scale_smog.throughput import FIXED_VALUES, build_batches

PX, DIM, RESET_EVERY = 32, 128, 300
FLOOR_EQUAL, FLOOR_BEST = 1.3, 1.5


class Ours:
    """The framework: tars, the recipe's loader, the loop's step, the groups' own k-means."""

    def __init__(
        self, tars: Path, batch: int, num_groups: int, threads: int, device: torch.device,
        loader: str,
    ):  # fmt: skip
        self.batch, self.device = batch, device
        self.recipe = self._recipe(tars, batch, num_groups, threads, loader)
        self.state = build_state(self.recipe, batch, device)
        assert isinstance(self.state.method, Smog)
        self.method = self.state.method
        for _ in range(RESET_EVERY):  # features for the reset, as after so many steps
            self.method.bank.push(F.normalize(torch.randn(batch, DIM, device=device)))

    @staticmethod
    def _recipe(tars: Path, batch: int, num_groups: int, threads: int, loader: str) -> Recipe:
        return Recipe.model_validate(
            {
                "run": {"steps": 1},
                "data": {
                    "path": str(tars),
                    "loader": loader,
                    "global_batch": batch,
                    "workers": threads,
                    "large_px": PX,
                },
                # lightly's example at 32 px: no blur, colours always jittered
                "augment": {"blur": [0.0, 0.0], "jitter": 1.0},
                "model": {"backbone": "resnet18", "dim": DIM, "ema": 0.99},
                "grouping": {
                    "num_groups": num_groups,
                    "init": "random",
                    "reset_every": 10**6,  # `reset` is called and timed by itself
                    "bank_steps": RESET_EVERY,
                },
                "optimizer": {"name": "sgd", "weight_decay": 1e-6},
                "engine": {"precision": "bf16" if torch.cuda.is_available() else "fp32"},
            }
        )

    def steps(self, num: int) -> Iterator[None]:
        """Trains on batches as they come."""
        for batch in build_batches(self.recipe, self.batch, num, False, self.device):
            train_step(self.state, batch, FIXED_VALUES)
            synchronize(self.device)
            yield

    def reset(self) -> None:
        """Groups by k-means, momentum net from the online one."""
        self.method.groups.reseed_from(self.method.bank)
        self.state.engine.reset_momentum()
        synchronize(self.device)


class LightlyExample(nn.Module):
    """What lightly's example does at a step, of lightly's parts."""

    def __init__(
        self, images: Path, batch: int, num_groups: int, workers: int, device: torch.device,
        channels_last: bool,
    ):  # fmt: skip
        super().__init__()
        self.device, self.batch, self.workers = device, batch, workers
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone = nn.Sequential(*list(resnet18().children())[:-1])
        self.projection_head = SMoGProjectionHead(512, 2048, DIM)
        self.prediction_head = SMoGPredictionHead(DIM, 2048, DIM)
        self._copy_momentum()
        start = F.normalize(torch.rand(num_groups, DIM))
        self.smog = SMoGPrototypes(group_features=start, beta=0.99)
        size = (RESET_EVERY * batch, DIM)
        self.memory = MemoryBankModule(size=size, feature_dim_first=False)
        self.to(device)
        if device.type == "cuda" and channels_last:
            self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.optimizer = torch.optim.SGD(
            [
                *self.backbone.parameters(),
                *self.projection_head.parameters(),
                *self.prediction_head.parameters(),
            ],
            lr=0.01,
            momentum=0.9,
            weight_decay=1e-6,
        )
        transform = SMoGTransform(
            crop_sizes=(PX, PX),
            crop_counts=(1, 1),
            crop_min_scales=(0.2, 0.2),
            crop_max_scales=(1.0, 1.0),
            gaussian_blur_probs=(0.0, 0.0),
        )
        self.dataset = ImageFolder(str(images), transform)

    def _copy_momentum(self) -> None:
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        utils.deactivate_requires_grad(self.backbone_momentum)
        utils.deactivate_requires_grad(self.projection_head_momentum)

    def steps(self, num: int) -> Iterator[None]:
        """Trains on batches as they come, the views changing sides."""
        loader = DataLoader(
            self.dataset, self.batch, shuffle=True, drop_last=True, num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        for step, (views, _) in zip(range(num), loader, strict=False):
            x0, x1 = (x.to(self.device, memory_format=self.format) for x in views)
            self._train(*(x1, x0) if step % 2 else (x0, x1))
            synchronize(self.device)
            yield

    def _train(self, x0: Tensor, x1: Tensor) -> None:
        utils.update_momentum(self.backbone, self.backbone_momentum, 0.99)
        utils.update_momentum(self.projection_head, self.projection_head_momentum, 0.99)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            encoded = self.projection_head(self.backbone(x0).flatten(start_dim=1))
            predicted = self.prediction_head(encoded)
            with torch.no_grad():
                other = self.backbone_momentum(x1).flatten(start_dim=1)
                other = self.projection_head_momentum(other)
        encoded, predicted, other = encoded.float(), predicted.float(), other.float()
        assignments = self.smog.assign_groups(other)
        group_features = self.smog.get_updated_group_features(encoded)
        logits = self.smog(predicted, group_features, temperature=0.1)
        self.smog.set_group_features(group_features.detach())
        loss = F.cross_entropy(logits, assignments)
        self.memory(encoded.detach(), update=True)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def reset(self) -> None:
        """Groups by scikit-learn's k-means, momentum net from the online one."""
        features = self.memory.bank.detach().cpu().numpy()
        kmeans: Any = KMeans(len(self.smog.group_features), n_init="auto").fit(features)
        centres = torch.from_numpy(kmeans.cluster_centers_).float()
        self.smog.set_group_features(F.normalize(centres, dim=1))
        self._copy_momentum()


def main() -> None:
    """Prints every side's step and reset, and the claims."""
    arguments = parse_arguments(__doc__, images="image folder with a sub-folder per class")
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", module="torch.utils.data")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    batch, num_groups, num_steps = (32, 20, 2) if arguments.quick else (256, 300, 12)
    num_warm_up = 2 * arguments.threads  # what the peer's workers have ready may not count
    with tempfile.TemporaryDirectory() as folder, one_rank():
        images, tars, threads = Path(arguments.images), Path(folder), arguments.threads
        shard_folder(images, tars, workers=threads)
        ours, from_memory = (
            Ours(tars, batch, num_groups, threads, device, loader) for loader in ("dali", "memory")
        )
        torch.manual_seed(0)
        as_it_is, formatted = (
            LightlyExample(images, batch, num_groups, threads, device, channels_last)
            for channels_last in (False, True)
        )
        sides: dict[str, Ours | LightlyExample] = {
            "ours": ours,
            "ours, images kept decoded": from_memory,
            "lightly's example, channels_last": formatted,
            "lightly's example as it is": as_it_is,
        }
        print(f"a step; {PX} px, batch {batch}, {num_groups} groups, {threads} threads")
        steps: dict[str, Callable[[], Iterator[None]]] = {
            name: lambda side=side: side.steps(num_warm_up + num_steps)
            for name, side in sides.items()
        }
        step_s = interleaved_streams(steps, num_warm_up, num_steps, arguments.repeats)
        print("a reset by k-means")
        resets = {"ours": ours.reset, "lightly's example": as_it_is.reset}
        reset_s = interleaved(resets, 1)
    rate = {}
    for name, seconds in step_s.items():
        reset = reset_s["ours" if name.startswith("ours") else "lightly's example"]
        rate[name] = batch / (seconds + reset / RESET_EVERY)
    equal = rate["lightly's example, channels_last"]
    best, peers_best = (
        max(value for name, value in rate.items() if name.startswith("ours") == is_ours)
        for is_ours in (True, False)
    )
    what = f"images/s against lightly's SMoG example, ResNet-18, {PX} px, {device.type}"
    claim(
        f"{what}, each at its best (at least {FLOOR_BEST})",
        best, peers_best, higher_is_better=True,
    )  # fmt: skip
    claim(
        f"{what}, equal precision and memory format (at least {FLOOR_EQUAL})",
        rate["ours"], equal, higher_is_better=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
