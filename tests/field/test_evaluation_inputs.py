"""Datasets, lists and paths as evaluations meet them: each kind, and what comes of it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from images import jpeg, make_dataset
from safetensors.torch import load_file
from small_recipe import small_recipe

from scale_smog.checkpoint.nets import find_checkpoint
from scale_smog.config import DataConfig, EvaluationConfig
from scale_smog.data.folder_dataset import FolderDataset
from scale_smog.errors import UserError
from scale_smog.evaluation.knn import KnnProbe, knn_accuracy
from scale_smog.evaluation.program import PROGRAMS, evaluate
from scale_smog.evaluation.protocols import load_protocols
from scale_smog.evaluation.supervised.label_subsets import hold_out, listed_samples
from scale_smog.export import export
from scale_smog.pretrain import pretrain
from scale_smog.recipe import dump_recipe

SHORT = ["linear.epochs=2", "linear.batch=8", "data.workers=0"]


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, tars) -> Path:
    """The folder of a run of two steps."""
    recipe = small_recipe(tmp_path_factory.mktemp("short"), tars, "run.steps=2")
    pretrain(recipe)
    return Path(recipe.run.dir)


def folder_of(folder: Path, images_of: dict[str, int]) -> Path:
    """`train` and `test` with so many images of each class."""
    for split in ("train", "test"):
        for name, count in images_of.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                path = folder / split / name / f"image_{number:04d}.jpg"
                path.write_bytes(jpeg(20, 20, number))
    return folder


# Held-out images of classes of all sizes.


def zipf(num_classes: int, largest: int) -> np.ndarray:
    return np.repeat(
        np.arange(num_classes), [max(1, largest // (c + 1)) for c in range(num_classes)]
    )


@pytest.mark.parametrize(
    ("labels", "share"),
    [
        (np.repeat([0, 1], [990, 10]), 0.02),  # a small class
        (np.repeat([0, 1], [990, 10]), 0.5),
        (zipf(500, 470), 0.02),  # a long tail
        (zipf(500, 470), 0.5),
        (np.arange(1000) % 10, 0.1),  # even
        (np.repeat(np.arange(1000), 13), 0.02),  # less than one image each
        (np.repeat(np.arange(50), 2), 0.5),  # pairs
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_held_out_is_a_share_of_each_class_but_never_its_last_image(labels, share, seed):
    train, held_out = hold_out(labels, share, seed)
    assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(len(labels)))
    sizes, gone = (np.bincount(x, minlength=labels.max() + 1) for x in (labels, labels[held_out]))
    assert (sizes - gone >= 1).all()
    free = sizes > 1
    assert (np.abs(gone - share * sizes)[free] <= 1).all()
    assert abs(len(held_out) - share * sizes[free].sum()) <= 1


def test_even_classes_give_evenly():
    labels = np.random.default_rng(0).permutation(np.arange(1000) % 10)
    _, held_out = hold_out(labels, 0.1, seed=0)
    assert np.bincount(labels[held_out]).tolist() == [10] * 10
    assert not np.array_equal(held_out, hold_out(labels, 0.1, seed=1)[1])


def test_a_set_with_a_class_of_one_image_is_evaluated_with_a_word(tmp_path, run_dir, capsys):
    data = folder_of(tmp_path, {"common": 30, "rare": 1})
    evaluate("linear", [str(run_dir)], [*SHORT, f"data.path={data}", "linear.held_out=0.2"])
    assert "1 of 2 classes are too small to hold out 0.2 of" in capsys.readouterr().out


def test_a_set_of_one_image_a_class_is_evaluated_with_a_word(tmp_path, run_dir, capsys):
    data = folder_of(tmp_path, {f"person{i:02d}": 1 for i in range(12)})
    evaluate("linear", [str(run_dir)], [*SHORT, f"data.path={data}"])
    said = capsys.readouterr().out
    assert "12 of 12 classes are too small" in said and "by the training images" in said


def test_one_learning_rate_needs_nothing_held_out(tmp_path, run_dir, capsys):
    data = folder_of(tmp_path, {"a": 1, "b": 1})
    own = [*SHORT, f"data.path={data}", "linear.learning_rates=[0.1]"]
    evaluate("linear", [str(run_dir)], own)
    assert "too small" not in capsys.readouterr().out


def test_more_than_half_held_out_is_refused():
    with pytest.raises(UserError, match=r"linear\.held_out"):
        load_protocols(["linear.held_out=0.6"])


# Lists of images.


@pytest.fixture
def animals(tmp_path) -> FolderDataset:
    """Two classes with images of the same names, and some of their own."""
    folder_of(tmp_path, {"anchor": 2, "zebra": 2})
    (tmp_path / "train" / "zebra" / "a b.jpg").write_bytes(jpeg(20, 20, 1))
    (tmp_path / "train" / "zebra" / "n01_7.JPEG").write_bytes(jpeg(20, 20, 2))
    (tmp_path / "train" / "zebra" / "deep").mkdir()
    (tmp_path / "train" / "zebra" / "deep" / "n02_7.JPEG").write_bytes(jpeg(20, 20, 2))
    (tmp_path / "train" / "deep").mkdir()
    for folder in ("deep", "zebra/deep"):
        (tmp_path / "train" / folder / "both.jpg").write_bytes(jpeg(20, 20, 2))
    return FolderDataset(tmp_path, "train")


def listed(dataset: FolderDataset, folder: Path, text: str | bytes) -> list[str]:
    path = folder / "list.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return [dataset.names[i] for i in listed_samples(dataset, str(path))]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("anchor/image_0000.jpg\n", ["anchor/image_0000.jpg"]),  # whole name before base name
        ("zebra/image_0000.jpg\n", ["zebra/image_0000.jpg"]),
        ("./zebra/image_0000.jpg\n", ["zebra/image_0000.jpg"]),
        ("/data/set/train/zebra/image_0001.jpg\n", ["zebra/image_0001.jpg"]),
        ("n01_7.JPEG\n", ["zebra/n01_7.JPEG"]),  # SimCLR's
        ("n02_7.JPEG\ndeep/n02_7.JPEG\n", ["zebra/deep/n02_7.JPEG"]),
        ("deep/both.jpg\n", ["deep/both.jpg"]),  # the whole name of one, an end of another
        ("a b.jpg\n", ["zebra/a b.jpg"]),  # blanks
        ("zebra/a b.jpg\r\n\r\nn01_7.JPEG\r\n", ["zebra/a b.jpg", "zebra/n01_7.JPEG"]),
        ("\ufeffn01_7.JPEG", ["zebra/n01_7.JPEG"]),  # a byte-order mark, no last line end
    ],
)
def test_a_list_names_images_wholly_or_by_a_unique_end(tmp_path, animals, text, names):
    assert listed(animals, tmp_path, text) == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image_0000.jpg\n", "may be anchor/image_0000.jpg or zebra/image_0000.jpg: give"),
        ("anchor/n01_7.JPEG\n", "1 of 1 names .* such as anchor/n01_7.JPEG"),  # it is a zebra
        ("a\n b.jpg\n", "2 of 2 names"),
        ("\n\n", "0 of 0 names"),
        (b"caf\xe9.jpg\n", "cannot read"),
    ],
)
def test_a_list_that_is_unclear_or_wrong_is_one_line(tmp_path, animals, text, words):
    with pytest.raises(UserError, match=words) as refusal:
        listed(animals, tmp_path, text)
    assert "\n" not in str(refusal.value)


# Neighbours.


@pytest.fixture(scope="module")
def twenty_classes(tmp_path_factory) -> DataConfig:
    data = make_dataset(tmp_path_factory.mktemp("twenty"), num_images=400, num_classes=20, px=12)
    return DataConfig(path=str(data), loader="torch", workers=0)


@pytest.mark.parametrize("k", [1, 3])
def test_top5_counts_no_class_without_a_vote(twenty_classes, k):
    config = EvaluationConfig(k=k, image_px=12, batch=64)
    probe = KnnProbe(twenty_classes, config, torch.device("cpu"))
    torch.manual_seed(0)
    top1, top5 = probe.accuracies(lambda images: torch.randn(len(images), 64))
    assert top5 == top1 if k == 1 else top1 < top5 < 0.24
    assert top5 < 0.12 or k > 1  # chance is k / 20


def test_neighbours_are_looked_for_among_other_images_than_those_tested(twenty_classes):
    probe = KnnProbe(twenty_classes, EvaluationConfig(k=1, image_px=12), torch.device("cpu"))
    assert probe.accuracy(lambda images: images.flatten(1)) < 0.5  # of itself it would be 1


def test_a_vote_counts_however_cold_the_temperature():
    train_z, train_y = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 1])
    assert knn_accuracy(train_z, train_y, train_z, train_y, k=2, temperature=1e-4) == 1.0


# Paths.


@pytest.mark.parametrize(
    ("inside", "path"),
    [
        ("checkpoints", "step-00000002"),
        ("checkpoints", "."),
        ("checkpoints/step-00000002", "."),
        (".", "."),
        (".", "checkpoints"),
        (".", "checkpoints/step-00000002/"),
        (".", "../run"),
    ],
)
def test_a_checkpoint_is_found_from_inside_its_folders(run_dir, monkeypatch, capsys, inside, path):
    monkeypatch.chdir(run_dir / inside)
    PROGRAMS["knn"]([path], [], False)
    assert str(run_dir / "checkpoints" / "step-00000002") in capsys.readouterr().out


def test_a_relative_dataset_is_found_from_inside_the_run(tmp_path, tars, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").symlink_to(tars)
    small = ["run.steps=1", "run.dir=runs/short", "evaluation.num_test_images=4"]
    pretrain(small_recipe(tmp_path, "set", *small))
    monkeypatch.chdir(tmp_path / "runs" / "short" / "checkpoints")
    PROGRAMS["knn"](["step-00000001"], [], False)
    assert "trained" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/demo"])
def test_a_run_may_lie_in_a_folder_of_that_name(run_dir, tmp_path, name):
    run = tmp_path / name
    shutil.copytree(run_dir / "checkpoints", run / "checkpoints")
    assert find_checkpoint(run) == (run / "checkpoints" / "step-00000002", run)


@pytest.mark.parametrize("path", ["recipe.yaml", "tensorboard", "checkpoints/step-00000009", "no"])
def test_a_path_that_is_neither_run_nor_checkpoint_is_one_line(run_dir, path):
    with pytest.raises(UserError, match=f"no checkpoint in .*{path}: give a run folder"):
        find_checkpoint(run_dir / path)


def test_a_checkpoint_that_lost_a_file_is_not_taken(run_dir, tmp_path):
    shutil.copytree(run_dir / "checkpoints", tmp_path / "checkpoints")
    step = tmp_path / "checkpoints" / "step-00000002"
    next(step.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="not a whole checkpoint: "):
        find_checkpoint(step)
    with pytest.raises(UserError, match="no checkpoint in"):
        find_checkpoint(tmp_path)


def test_the_card_of_an_export_of_here_names_the_run(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(run_dir)
    done = export(".", str(tmp_path / "out"), "timm")
    assert "backbone of run, step-00000002" in (done.folder / "README.md").read_text()


def test_an_export_to_here_says_where_it_is(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = export(str(run_dir), ".", "timm")
    assert f'load_file("{tmp_path.name}/model.safetensors")' in done.usage
    assert load_file(tmp_path / "model.safetensors")


# Sizes of images and batches.


def test_a_size_that_the_net_cannot_take_is_one_line(tmp_path, monkeypatch):
    recipe = small_recipe(tmp_path, "nowhere", "model.backbone=mixer_s16_224")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    monkeypatch.setattr(
        "scale_smog.evaluation.task.find_checkpoint", lambda path: (tmp_path / "x", tmp_path)
    )
    with pytest.raises(UserError, match=r"mixer_s16_224 does not take .*evaluation\.image_px=96"):
        evaluate("knn", [str(tmp_path)], ["evaluation.image_px=96"])


def test_fine_tuning_on_one_image_at_a_time_is_one_line(run_dir):
    with pytest.raises(UserError, match=r"finetune\.batch=1: batch norm needs two images"):
        evaluate("finetune", [str(run_dir)], ["finetune.batch=1", "finetune.share=0.5"])
