"""A run to evaluate."""

from pathlib import Path

import pytest
from images import make_dataset
from small_recipe import small_recipe

from scale_smog.pretrain import pretrain


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tars: Path) -> Path:
    """The folder of a run of eight steps on forty images."""
    folder = tmp_path_factory.mktemp("run")
    recipe = small_recipe(folder, tars)
    pretrain(recipe)
    return Path(recipe.run.dir)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in folders: `train` and `test`, with a folder for each class."""
    folder = tmp_path_factory.mktemp("folders")
    made = make_dataset(folder).parent
    for split in ("train", "test"):
        (folder / f"source-{split}").rename(folder / split)
    return made
