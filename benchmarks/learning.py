"""How well methods learn on a small set: equal nets, views, rates, steps and judge.

    python benchmarks/learning.py {cifar10,shapes} TARS RESULTS.jsonl RUN [RUN …]
        [--seeds 0 1 2] [--quick]

TARS is a dataset of `data_tools/shard.py` with a training and a test split. A RUN is `label: method
section.key=value …`, the method one of `methods.METHODS`. A line is added to RESULTS for each run
and seed, with its settings and the dataset's hash; those that it has already are left out, so the
same command goes on after a stop. The last tenth of the training images is held out to choose
settings on (`selection`), and `data.num_images=N` trains on the first N, a random draw where shards
are of a folder and so shuffled; what is reported is the test split. kNN of backbone features,
centre crops.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import claim
from torch import Tensor, nn

# A look for GPUs through the driver would leave forked processes without them.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

QUICK = ("run.steps=2", "data.global_batch=32", "model.head_width=256", "grouping.num_groups=20")
NUM_BANK, EMBEDDED_AT_ONCE = 10_000, 500
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "cifar10": {
        "run": {"steps": 600, "small_data": True},
        "data": {"global_batch": 256, "large_px": 32},
        "augment": {
            "brightness": 0.15, "saturation": 0.4, "blur": [0.0, 0.0], "solarize": [0.0, 0.0],
        },
        "model": {"backbone": "resnet_tiny"},
        "evaluation": {"k": 20, "temperature": 0.1, "image_px": 32, "crop_share": 1.0},
    },
    "shapes": {
        "run": {"steps": 900, "small_data": True},
        "data": {"global_batch": 128, "large_px": 32, "small_px": 24},
        "augment": {
            "large_scale": [0.25, 0.7], "small_scale": [0.1, 0.25], "brightness": 0.2,
            "saturation": 0.8, "hue": 0.5, "grey": 0.5, "blur": [0.0, 0.0], "solarize": [0.0, 0.0],
        },
        "model": {"backbone": "resnet_tiny", "head_width": 512},
        "evaluation": {"k": 20, "temperature": 0.1, "image_px": 48, "crop_share": 1.0},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One method with its settings and a seed, on a dataset."""

    label: str
    method: str
    overrides: tuple[str, ...]
    seed: int
    setting: str
    tars: str
    curve_points: int = 3  # how often it is judged

    @classmethod
    def parse(cls, text: str, seed: int, setting: str, tars: str, curve_points: int = 3) -> "Run":
        """`label: method section.key=value …`"""
        from methods import METHODS

        label, _, rest = text.partition(":")
        method, *overrides = rest.split() or [""]
        if method not in METHODS:
            raise SystemExit(f"{text!r} is not 'label: method …', a method of {', '.join(METHODS)}")
        return cls(label.strip(), method, tuple(overrides), seed, setting, tars, curve_points)

    def identity(self) -> dict[str, Any]:
        """All that its result depends on, but for the code."""
        from scale_smog.data.manifest import manifest_sha256

        return {
            "label": self.label,
            "method": self.method,
            "seed": self.seed,
            "precision": recipe_of(self).engine.precision,
            "dataset": manifest_sha256(self.tars)[:16],
            "settings": self.tree(),
        }

    def tree(self) -> dict[str, dict[str, Any]]:
        """Sections and keys: those of the dataset with the run's own changes."""
        from scale_smog.config import Recipe
        from scale_smog.methods import METHODS
        from scale_smog.recipe import apply_override

        tree = json.loads(json.dumps(SETTINGS[self.setting]))
        if self.method in METHODS:
            tree["method"] = {"name": self.method}
        for override in self.overrides:
            apply_override(tree, override, Recipe)
        return tree


@dataclass(frozen=True)
class Judge:
    """Accuracy of an embedding on images it has not been trained on."""

    bank: tuple[Tensor, Tensor]  # images [N, 3, px, px], labels [N]
    sets: dict[str, tuple[Tensor, Tensor]]
    k: int
    temperature: float

    @torch.no_grad()
    def accuracies(self, backbone: nn.Module, *names: str) -> dict[str, float]:
        """kNN top-1 of each set, or of those named, 0 to 1."""
        from scale_smog.evaluation import knn_accuracy

        was_training = backbone.training
        backbone.eval()
        device = next(backbone.parameters()).device
        z, y = self._embed(backbone, self.bank[0]), self.bank[1].to(device)
        found = {}
        for name in names or self.sets:
            images, labels = self.sets[name]
            test_z = self._embed(backbone, images)
            for suffix, k in (("", self.k), ("_k200", 200)):
                found[name + suffix] = knn_accuracy(z, y, test_z, labels, k, self.temperature)
        backbone.train(was_training)
        return found

    def _embed(self, backbone: nn.Module, images: Tensor) -> Tensor:
        device = next(backbone.parameters()).device
        chunks = images.split(EMBEDDED_AT_ONCE)
        return torch.cat([backbone(chunk.to(device)).float() for chunk in chunks])


def train(run: Run) -> dict[str, Any]:
    """Trains and judges; one process, one thread, or a GPU."""
    from methods import METHODS
    from step import one_rank

    from scale_smog.data import EpochPlan, TarDataset
    from scale_smog.data.augment import training_views
    from scale_smog.data.loaders.batch_source import BatchSource
    from scale_smog.data.loaders.memory import MemoryLoader
    from scale_smog.schedules import Schedules
    from scale_smog.small_data import fit_to_data

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    recipe = recipe_of(run)
    dataset = TarDataset(run.tars, "train")
    num_train = min(dataset.num_samples * 9 // 10, recipe.data.num_images)
    recipe, _ = fit_to_data(recipe, num_train)
    plan = EpochPlan(num_train, recipe.data.global_batch, run.seed)
    schedules = Schedules.of_run(recipe.run, recipe.optimizer, recipe.grouping, plan)
    views = training_views(recipe.data, recipe.augment)
    source = BatchSource(dataset, plan, views, run.seed, 0, 1)
    loader = MemoryLoader(source, range(schedules.num_steps), device)
    judge = build_judge(recipe, num_train)
    with one_rank():
        contestant = METHODS[run.method](recipe, loader, num_train, device)
        curve, losses, begin, judging = [], [], clocks(), np.zeros(2)
        points = schedules.num_steps // run.curve_points
        for step, batch in enumerate(loader, 1):
            losses.append(contestant.step(batch, schedules.at(step - 1)))
            if points and step % points == 0 and step + points <= schedules.num_steps:
                pause = clocks()
                curve.append(point(step, losses, judge.accuracies(contestant.backbone, "test")))
                judging += clocks() - pause
        seconds, of_processor = clocks() - begin - judging
        accuracy = judge.accuracies(contestant.backbone)
        curve.append(point(schedules.num_steps, losses, accuracy))
    measured = {"seconds": seconds, "processor_seconds": of_processor, "curve": curve}
    return run.identity() | accuracy | contestant.figures() | measured


def clocks() -> np.ndarray:
    """Seconds of the wall and of this process [2]: other processes slow the first."""
    return np.array([time.perf_counter(), time.process_time()])


def point(step: int, losses: Sequence[Tensor], accuracy: dict[str, float]) -> dict[str, float]:
    """Of the curve: the mean loss of the last 20 steps and the accuracy on the test split."""
    loss = torch.stack(list(losses[-20:])).mean().item()
    return {"step": step, "loss": loss, "test": accuracy["test"]}


def recipe_of(run: Run) -> Any:
    """Its settings; in bf16 where the device computes in it, the same for all methods."""
    from scale_smog.config import Recipe
    from scale_smog.recipe import validate

    tree = run.tree()
    tree["run"]["seed"] = run.seed
    tree["data"]["path"] = run.tars
    has_bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    tree.setdefault("engine", {}).setdefault("precision", "bf16" if has_bf16 else "fp32")
    return validate(Recipe, tree)


def build_judge(recipe: Any, num_train: int) -> Judge:
    """Centre crops of the first training images, of those held out, and of the test split."""
    config = recipe.evaluation
    images, labels = crops(recipe.data.path, "train", config.image_px, config.crop_share)
    of_bank, held_out = slice(min(NUM_BANK, num_train)), slice(len(images) * 9 // 10, None)
    sets = {
        "selection": (images[held_out], labels[held_out]),
        "test": crops(recipe.data.path, "test", config.image_px, config.crop_share),
    }
    return Judge((images[of_bank], labels[of_bank]), sets, config.k, config.temperature)


@cache
def crops(tars: str, split: str, px: int, share: float) -> tuple[Tensor, Tensor]:
    """Centre crops [N, 3, px, px] of all images of a split, and their labels [N]."""
    from scale_smog.config import DataConfig, EvaluationConfig
    from scale_smog.data.datasets import open_split
    from scale_smog.evaluation import embed_images
    from scale_smog.evaluation.splits import test_split

    images = open_split(tars, test_split(tars) if split == "test" else split)
    ids, cpu = np.arange(images.num_samples), torch.device("cpu")
    config = EvaluationConfig(image_px=px, crop_share=share)
    data = DataConfig(path=tars, loader="torch", workers=0)
    flat = embed_images(lambda x: x.flatten(1), data, config, images, ids, cpu)
    return flat.view(-1, 3, px, px), torch.from_numpy(images.labels[ids])


def campaign(runs: Sequence[Run], results: Path, jobs: int) -> list[dict[str, Any]]:
    """Trains what `results` does not have yet, `jobs` at a time; returns its lines of `runs`."""
    done = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    identities = [run.identity() for run in runs]

    def is_of(line: dict[str, Any], identity: dict[str, Any]) -> bool:
        return all(line.get(key) == value for key, value in identity.items())

    missing = [
        run
        for run, identity in zip(runs, identities, strict=True)
        if not any(is_of(line, identity) for line in done)
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    for line in _trained(missing, jobs):
        done.append(line)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        usage = f"  perplexity {line['perplexity']:.0f}" if "perplexity" in line else ""
        print(
            f"{line['label']:<36} seed {line['seed']}  selection {line['selection']:.3f}  "
            f"test {line['test']:.3f}{usage}  {line['seconds']:.0f} s",
            flush=True,
        )
    return [line for line in done if any(is_of(line, identity) for identity in identities)]


def _trained(runs: Sequence[Run], jobs: int) -> Iterator[dict[str, Any]]:
    """Each in a process forked from this one, which has imported and decoded for all."""
    if not runs:
        return
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    import methods  # noqa: F401  what takes seconds to import

    for run in runs:
        config = recipe_of(run).evaluation
        for split in ("train", "test"):
            crops(run.tars, split, config.image_px, config.crop_share)
    context, waiting, running = get_context("fork"), list(runs), []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(context, waiting.pop(0)))
        ready = wait(running)
        for receiver in [one for one in running if one in ready]:
            running.remove(receiver)
            try:
                yield receiver.recv()
            except EOFError:
                raise SystemExit("a run has ended without a result: see above") from None


def _start(context: Any, run: Run) -> Connection:
    """A process that trains; what comes out of the connection is its result."""
    receiver, sender = context.Pipe(duplex=False)
    context.Process(target=_train_and_send, args=(run, sender), daemon=True).start()
    sender.close()  # else the end of the process would not be noticed
    return receiver


def _train_and_send(run: Run, sender: Connection) -> None:
    sender.send(train(run))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds of each label, best first, as Markdown."""
    labels: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        labels.setdefault(line["label"], []).append(line)
    rows = [
        "| run | kNN, held out | kNN, test | seeds | perplexity | s a run |",
        "|---|---|---|---|---|---|",
    ]

    def spread(group: list[dict[str, Any]], key: str) -> str:
        values = [line[key] for line in group if key in line]
        deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{deviation}" if values else "–"

    for label, group in sorted(labels.items(), key=lambda x: -mean_of(x[1], "selection")):
        perplexity = f"{mean_of(group, 'perplexity'):.0f}" if "perplexity" in group[0] else "–"
        cells = [
            label,
            spread(group, "selection"),
            spread(group, "test"),
            str(len(group)),
            perplexity,
        ]
        rows.append("| " + " | ".join([*cells, f"{mean_of(group, 'seconds'):.0f}"]) + " |")
    return "\n".join(rows)


def mean_of(lines: Sequence[dict[str, Any]], key: str) -> float:
    """Of a figure that all lines have."""
    return statistics.mean(line[key] for line in lines)


def main() -> None:
    """Trains and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("tars")
    parser.add_argument("results", type=Path)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--quick", action="store_true", help="two steps of each")
    parser.add_argument(
        "--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count()
    )
    arguments = parser.parse_args()
    where = (arguments.setting, arguments.tars)
    runs = [
        Run.parse(f"{text} {' '.join(QUICK)}" if arguments.quick else text, seed, *where)
        for text in arguments.runs
        for seed in arguments.seeds
    ]
    lines = campaign(runs, arguments.results, arguments.jobs)
    print(table(lines))
    labels = {line["label"] for line in lines}
    mean = {x: mean_of([y for y in lines if y["label"] == x], "test") for x in labels}
    best, worst = max(labels, key=mean.__getitem__), min(labels, key=mean.__getitem__)
    text = f"kNN top-1 of {best} against {worst}, means of the seeds"
    claim(text, mean[best], mean[worst], higher_is_better=True)


if __name__ == "__main__":
    main()
