"""One evaluation of one checkpoint: what it depends on, how far it is, what came out."""

import hashlib
import json
import os
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scale_smog import distributed
from scale_smog.config import Recipe
from scale_smog.data.image_folder import Images, open_split, split_sha256
from scale_smog.errors import UserError
from scale_smog.evaluation.checkpoints import (
    Embed,
    find_checkpoint,
    frozen,
    load_online_net,
    random_backbone,
    weights_sha256,
)
from scale_smog.evaluation.protocols import Protocols, load_protocols, split_overrides
from scale_smog.evaluation.splits import require_labels, require_same_classes, test_split
from scale_smog.recipe import load_recipe
from scale_smog.reporting import run_folder
from scale_smog.runtime.files import write_atomically

PROGRESS_FILE = "progress.pt"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Job:
    """A checkpoint, the settings it is judged under, and the folder of this judgement.

    Attributes:
        name: of the evaluation, such as "linear".
        checkpoint: its folder.
        run_dir: the run's folder.
        recipe: of the run, with the command's overrides.
        protocols: of the evaluations, with the command's overrides.
        device: to compute on.
        settings: what the result depends on besides weights and images.
        data_sha256: of each split in use, and of the ids of a finetuning's labels.
    """

    name: str
    checkpoint: Path
    run_dir: Path
    recipe: Recipe
    protocols: Protocols
    device: torch.device
    settings: dict[str, Any] = field(default_factory=dict)
    data_sha256: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, path: str, overrides: Iterable[str], device: torch.device) -> "Job":
        """Finds the checkpoint that `path` means.

        Raises:
            UserError: there is none, or an override is wrong.
        """
        checkpoint, run_dir = find_checkpoint(Path(path))
        own, protocols = split_overrides(overrides)
        recipe = load_recipe(run_dir / run_folder.RECIPE_FILE, own)
        return cls(name, checkpoint, run_dir, recipe, load_protocols(protocols), device)

    def labelled_splits(self) -> tuple[Images, Images]:
        """The training and the test split of the run's dataset.

        Raises:
            UserError: one is missing, has no labels, or their classes differ.
        """
        path = self.recipe.data.path
        train, test = open_split(path, "train"), open_split(path, test_split(path))
        for dataset in (train, test):
            require_labels(dataset, path, self.name)
        require_same_classes(train, test, path)
        return train, test

    def labelled_hashes(self) -> dict[str, str]:
        """The hashes of these two splits."""
        path = self.recipe.data.path
        return {split: split_sha256(path, split) for split in ("train", test_split(path))}

    def backbone(self) -> nn.Module:
        """The checkpoint's online backbone, on the CPU; the caller's own."""
        return deepcopy(self._backbone)

    @cached_property
    def _backbone(self) -> nn.Module:
        return load_online_net(self.checkpoint, self.recipe).backbone

    def backbones(self) -> dict[str, nn.Module]:
        """The nets to judge: "trained", and "random" where the recipe asks for baselines."""
        nets = {"trained": self.backbone()}
        if self.recipe.evaluation.baselines:
            nets["random"] = random_backbone(self.recipe)
        return nets

    def embeds(self) -> dict[str, Embed]:
        """The same, frozen: images [B, 3, H, W] -> features [B, F]."""
        nets = self.backbones()
        return {name: frozen(net, self.recipe, self.device) for name, net in nets.items()}

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON."""
        return {
            "settings": self.settings,
            "model": self.recipe.model.model_dump(),
            "precision": self.recipe.engine.precision,
            "checkpoint": f"{self.run_dir.name}/{self.checkpoint.name}",
            "checkpoint_sha256": weights_sha256(self._backbone),
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
        if not distributed.is_main():
            return
        path = self.made_folder() / f"{part}-{PROGRESS_FILE}"
        aside = path.with_suffix(".tmp")
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)

    def log(self, line: dict[str, Any]) -> None:
        """Adds a line to the evaluation's metrics; on rank 0 only."""
        if distributed.is_main():
            with open(self.made_folder() / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def finish(self, figures: dict[str, float]) -> None:
        """Writes results.json, with every setting and hash, and adds the figures to the run's."""
        if distributed.is_main():
            text = json.dumps({"figures": figures, **self.facts}, indent=1) + "\n"
            write_atomically(self.made_folder() / run_folder.RESULTS_FILE, text.encode())
        run_folder.add_results(self.run_dir, {self.name: figures})

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
