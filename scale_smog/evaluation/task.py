"""One evaluation of one checkpoint: what it depends on, how far it is, what came out."""

import hashlib
import json
import os
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scale_smog import distributed
from scale_smog.checkpoint.nets import find_checkpoint, load_net
from scale_smog.config import Recipe
from scale_smog.data.datasets import Images
from scale_smog.data.remote.space import use_cache
from scale_smog.errors import UserError
from scale_smog.evaluation.features import Encoder, embed_images, random_backbone
from scale_smog.evaluation.protocols import Protocols, load_protocols, split_overrides
from scale_smog.evaluation.splits import named_splits
from scale_smog.models import MomentumNet, OnlineNet
from scale_smog.models.check import require_images_fit
from scale_smog.models.weights import backbone_sha256
from scale_smog.recipe import load_recipe
from scale_smog.reporting import run_folder
from scale_smog.runtime import run_layout
from scale_smog.runtime.files import write_atomically

PROGRESS_FILE = "progress.pt"
DENSE = ("segmentation", "detection")  # which have images of their own

Results = dict[str, Any]  # accuracies as fractions, and what they depend on


@dataclass(frozen=True)
class EvaluationTask:
    """A checkpoint, the settings of its evaluation, and the folder of the outcome.

    Attributes:
        name: of the evaluation, such as "linear".
        checkpoint: its folder.
        run_dir: the run's folder.
        recipe: of the run, with the command's overrides.
        protocols: of the evaluations, with the command's overrides.
        device: to compute on.
        settings: what the result depends on besides weights and images.
        data_sha256: of each split in use, and of the ids of a finetuning's labels.
        own_net: `evaluation.net` of the run.
    """

    name: str
    checkpoint: Path
    run_dir: Path
    recipe: Recipe
    protocols: Protocols
    device: torch.device
    own_net: str  # that the run's own recipe evaluates
    settings: dict[str, Any] = field(default_factory=dict)
    data_sha256: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls, name: str, path: str, overrides: Iterable[str], device: torch.device
    ) -> "EvaluationTask":
        """Finds the checkpoint that `path` means.

        Raises:
            UserError: there is none, an override is wrong, or the net does not take such images.
        """
        # One rank looks: training may write another checkpoint meanwhile.
        checkpoint, run_dir = distributed.call_on_main(lambda: find_checkpoint(Path(path)))
        own, protocols = split_overrides(overrides)
        file = run_dir / run_layout.RECIPE_FILE
        recipe, own_net = load_recipe(file, own), load_recipe(file).evaluation.net
        recipe = _with_data_found(recipe, run_dir)
        use_cache(recipe.data.cache_dir, recipe.data.cache_gib)
        sizes_px = {"evaluation.image_px": recipe.evaluation.image_px}
        require_images_fit(recipe.model, sizes_px, batch=2)
        settings = load_protocols(protocols)
        return cls(name, checkpoint, run_dir, recipe, settings, device, own_net)

    @property
    def step(self) -> int:
        """Of pre-training, at which the checkpoint was written."""
        return int(self.checkpoint.name.rpartition("-")[2])

    def labelled_splits(self) -> dict[str, Images]:
        """The training and then the test split of the run's dataset, each by its name.

        Raises:
            UserError: one is missing, has no labels, or their classes differ.
        """
        return named_splits(self.recipe.data.path, self.name)

    def net(self) -> OnlineNet | MomentumNet:
        """The checkpoint's net that `evaluation.net` names, on the CPU."""
        recipe = self.recipe
        return load_net(self.checkpoint, recipe.model, recipe.nets, recipe.evaluation.net)

    def backbone(self) -> nn.Module:
        """The backbone of this net, on the CPU; the caller's own, to train or not."""
        return deepcopy(self._backbone).requires_grad_(True)  # a momentum net's has no gradients

    @cached_property
    def _backbone(self) -> nn.Module:
        return self.net().backbone

    def random_backbone(self) -> nn.Module:
        """A backbone with random weights, of the run's seed, for comparison."""
        return random_backbone(self.recipe.model, self.recipe.run.seed)

    def backbones(self) -> dict[str, nn.Module]:
        """The nets to evaluate: "trained", and "random" where the recipe asks for baselines."""
        nets = {"trained": self.backbone()}
        if self.recipe.evaluation.baselines:
            nets["random"] = self.random_backbone()
        return nets

    def frozen_encoders(self) -> dict[str, Encoder]:
        """The same, frozen: images [B, 3, H, W] -> features [B, F]."""
        return {name: self.frozen(net) for name, net in self.backbones().items()}

    def frozen(self, net: nn.Module) -> Encoder:
        """`net` for inference on the device, in the recipe's precision."""
        net.to(device=self.device, dtype=torch.float32).eval()

        @torch.no_grad()
        def encoder(images: Tensor) -> Tensor:
            with self.autocast():
                return net(images)

        return encoder

    def autocast(self) -> torch.autocast:
        """bf16 where the recipe has it."""
        is_bf16 = self.recipe.engine.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)

    def embed(self, encoder: Encoder, dataset: Images, ids: np.ndarray) -> Tensor:
        """Features [N, F] of centre crops of the images `ids` [N], on every rank; a collective."""
        recipe = self.recipe
        return embed_images(encoder, recipe.data, recipe.evaluation, dataset, ids, self.device)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON."""
        return {
            "settings": self.settings,
            "model": self.recipe.model.model_dump(),
            "precision": self.recipe.engine.precision,
            "checkpoint": f"{self.run_dir.name}/{self.checkpoint.name}",
            "checkpoint_sha256": backbone_sha256(self._backbone.state_dict()),
            "data_path": self.recipe.data.path,
            "data_sha256": self.data_sha256,
        }

    @cached_property
    def folder(self) -> Path:
        """Where this evaluation keeps its files; other settings have another folder."""
        fixed = {k: v for k, v in self.facts.items() if k not in ("checkpoint", "data_path")}
        text = json.dumps(fixed, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.run_dir / "evaluations" / f"{self.name}-{digest[:10]}"

    def load_progress(self, part: str) -> dict[str, Any] | None:
        """What `save_progress` kept of a part, or None."""
        path = self.folder / f"{part}-{PROGRESS_FILE}"
        # All ranks look before any of them goes on to write.
        found = distributed.broadcast_object(path.exists())
        return torch.load(path, map_location="cpu", weights_only=True) if found else None

    def save_progress(self, part: str, state: dict[str, Any]) -> None:
        """Keeps tensors and plain values of an unfinished evaluation; on rank 0 only."""
        if distributed.is_main():
            content = BytesIO()
            torch.save(state, content)
            path = self.made_folder() / f"{part}-{PROGRESS_FILE}"
            write_atomically(path, content.getvalue())

    def log(self, line: dict[str, Any]) -> None:
        """Adds a line to the evaluation's metrics; on rank 0 only."""
        if distributed.is_main():
            with open(self.made_folder() / run_layout.METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def finish(self, results: Results, about: dict[str, Any]) -> None:
        """Writes results.json, with every setting and hash, and adds the results to the run's.

        These are of a run's end and its own dataset only.

        Args:
            results: figures.
            about: what else a reader of the file should know.
        """
        net = self.recipe.evaluation.net
        key = self.name if net == self.own_net else f"{self.name}_{net}"
        if distributed.is_main():
            names = {"evaluation": self.name, "result": key}
            facts = {**names, "figures": results, **about, **self.facts}
            text = json.dumps(facts, indent=1) + "\n"
            write_atomically(self.made_folder() / run_layout.RESULTS_FILE, text.encode())
            if self.is_of_the_run():
                run_folder.add_results(self.run_dir, {key: results})

    def is_of_the_run(self) -> bool:
        """Whether it is of the run as it has ended, on its own images, and not of an older net."""
        ended = run_folder.read_results(self.run_dir).get("run", {}).get("step")
        if self.checkpoint != find_checkpoint(self.run_dir)[0] or ended != self.step:
            return False
        own = run_folder.dataset_sha256(self.run_dir)
        return self.name in DENSE or self.data_sha256["train"] == own

    def made_folder(self) -> Path:
        """The folder, made if it is not there.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}") from None
        return self.folder


def _with_data_found(recipe: Recipe, run_dir: Path) -> Recipe:
    """A relative `data.path` that is not here is one of the folder that the run began in."""
    start = Path(str(run_dir).removesuffix(os.path.normpath(recipe.run.dir)))
    path = start / recipe.data.path
    if Path(recipe.data.path).exists() or not path.exists():
        return recipe
    return recipe.with_values("data", path=str(path))
