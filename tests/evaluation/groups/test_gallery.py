"""The gallery of the groups."""

import json
import math
from base64 import b64decode
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from scale_smog.data import TarDataset
from scale_smog.evaluation.groups import gallery
from scale_smog.evaluation.groups.pictures import thumbnail
from scale_smog.runtime import run_layout


def write(tmp_path, tars) -> tuple[dict, TarDataset, torch.Tensor, torch.Tensor]:
    dataset = TarDataset(tars, "train")
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(40, 8, generator=generator))
    groups = F.normalize(torch.randn(5, 8, generator=generator))
    path = tmp_path / run_layout.GALLERY_FILE
    gallery.write_gallery(path, dataset, np.arange(40), z, groups, torch.arange(5) + 100)
    return json.loads(path.read_text()), dataset, z, groups


def test_a_group_shows_its_own_images_the_closest_first(tmp_path, tars):
    made, dataset, z, groups = write(tmp_path, tars)
    similarity = z @ groups.T
    for entry in made["groups"]:
        own = (similarity.argmax(dim=1) == entry["group"]).nonzero()[:, 0]
        closest = own[similarity[own, entry["group"]].argsort(descending=True)].tolist()
        assert len(entry["images"]) == min(len(own), gallery.IMAGES_A_GROUP)
        shown = Image.open(BytesIO(b64decode(entry["images"][0])))
        differences = [
            np.abs(np.asarray(shown, float) - np.asarray(thumbnail(dataset, i, 64), float)).mean()
            for i in range(40)
        ]
        assert int(np.argmin(differences)) == closest[0]


def test_figures_of_a_group_are_of_its_members(tmp_path, tars):
    made, dataset, z, groups = write(tmp_path, tars)
    similarity, nearest = (z @ groups.T).max(dim=1)
    assert [x["tightness"] for x in made["groups"]] == sorted(
        (x["tightness"] for x in made["groups"]), reverse=True
    )
    for entry in made["groups"]:
        own = nearest == entry["group"]
        assert entry["size"] == 100 + entry["group"]
        assert abs(entry["tightness"] - similarity[own].mean().item()) < 1e-3
        counts = np.bincount(dataset.labels[own.numpy()], minlength=4)
        shares = counts[counts > 0] / counts.sum()
        assert abs(entry["entropy"] + (shares * np.log(shares)).sum()) < 1e-3
        assert entry["entropy"] <= math.log(4) and max(entry["classes"].values()) == counts.max()


def test_many_groups_become_a_sample_of_bounded_size(tmp_path, tars, monkeypatch):
    monkeypatch.setattr(gallery, "MOST_GROUPS", 3)
    monkeypatch.setattr(gallery, "MOST_BYTES", 1)
    made, *_ = write(tmp_path, tars)
    assert len(made["groups"]) == 3
    assert [len(entry["images"]) for entry in made["groups"]] == [1, 0, 0]  # bytes are bounded
