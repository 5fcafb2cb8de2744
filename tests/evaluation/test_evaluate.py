"""The evaluations as commands: one process, several, tars, folders, bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from images import jpeg
from PIL import Image
from ports import free_port
from small_recipe import small_recipe

from scale_smog.checkpoint import list_checkpoints
from scale_smog.checkpoint.nets import read_part
from scale_smog.cli.main import main
from scale_smog.data.folder_dataset import FolderDataset
from scale_smog.data.prepare.shard import shard_folder
from scale_smog.errors import UserError
from scale_smog.evaluation.feature_files import write_features
from scale_smog.evaluation.groups import program as groups
from scale_smog.evaluation.groups.program import evaluate_groups
from scale_smog.evaluation.paper import ImageCounts, Ours
from scale_smog.evaluation.program import PROGRAMS, evaluate
from scale_smog.evaluation.supervised import finetune, linear
from scale_smog.evaluation.task import EvaluationTask
from scale_smog.models import build_backbone
from scale_smog.models.weights import backbone_sha256
from scale_smog.pretrain import pretrain
from scale_smog.runtime import run_layout

ROOT = Path(__file__).parent.parent.parent
SHORT = ["linear.epochs=4", "linear.batch=8", "linear.checkpoint_every=3"]


def _newest(run_dir: Path, name: str) -> Path:
    return max((run_dir / "evaluations").glob(f"{name}-*"), key=lambda x: x.stat().st_mtime)


def results(run_dir: Path, name: str) -> dict:
    return json.loads((_newest(run_dir, name) / "results.json").read_text())


def test_a_result_holds_every_setting_and_the_hashes(run_dir, capsys):
    evaluate("linear", [str(run_dir)], [*SHORT, "evaluation.baselines=true"], with_paper=True)
    found = results(run_dir, "linear")
    assert found["settings"]["linear"]["epochs"] == 4 and found["settings"]["evaluation"]["k"] == 5
    assert set(found["data_sha256"]) == {"train", "test"} and len(found["checkpoint_sha256"]) == 64
    figures = found["figures"]
    assert figures["top5"] == 1.0 and 0 <= figures["top1"] <= 1 and "random_top1" in figures
    assert sum(key.startswith("top1_at_") for key in figures) == 8
    assert json.loads((run_dir / "results.json").read_text())["linear"] == figures
    out = capsys.readouterr().out
    assert "no comparison: the paper has no linear results of resnet_tiny" in out


def test_the_momentum_net_is_evaluated_under_a_name_of_its_own(run_dir):
    found = {}
    for net in ("online", "momentum"):
        evaluate("knn", [str(run_dir)], [f"evaluation.net={net}"])
        found[net] = results(run_dir, "knn")
    assert found["online"]["checkpoint_sha256"] != found["momentum"]["checkpoint_sha256"]
    momentum = read_part(list_checkpoints(run_dir)[-1], "momentum")
    backbone = build_backbone("resnet_tiny")
    own = {k.removeprefix("backbone."): v for k, v in momentum.items() if "backbone" in k}
    backbone.load_state_dict(own)
    assert found["momentum"]["checkpoint_sha256"] == backbone_sha256(backbone.state_dict())
    kept = json.loads((run_dir / "results.json").read_text())
    assert kept["knn"] == found["online"]["figures"]
    assert kept["knn_momentum"] == found["momentum"]["figures"]


@pytest.mark.parametrize("net", ["online", "momentum"])
def test_a_finetuning_trains_all_weights_of_either_net(run_dir, net):
    short = ["finetune.share=0.5", "finetune.epochs=1", "finetune.batch=8"]
    evaluate("finetune", [str(run_dir)], [*short, f"evaluation.net={net}"])
    (path,) = _newest(run_dir, "finetune").glob("trained-progress.pt")
    trained = torch.load(path, weights_only=True)["net"]
    before = read_part(list_checkpoints(run_dir)[-1], net)
    names = [name for name, _ in build_backbone("resnet_tiny").named_parameters()]
    names = [f"backbone.{name}" for name in names]
    assert not [name for name in names if torch.equal(trained[name], before[name])]


def test_the_plain_name_is_the_runs_own_nets(tmp_path, tars):
    recipe = small_recipe(tmp_path, tars, "run.steps=4", "evaluation.net=momentum")
    pretrain(recipe)
    run_dir = Path(recipe.run.dir)
    for own in ([], ["evaluation.net=online"]):
        evaluate("knn", [str(run_dir)], own)
    found = json.loads((run_dir / "results.json").read_text())
    assert found["knn"]["net"] == "momentum" and found["knn_online"]["net"] == "online"


def test_the_paper_stands_beside_the_epochs_that_a_checkpoint_was_trained_for(run_dir):
    recipe = EvaluationTask.open("knn", str(run_dir), [], torch.device("cpu")).recipe
    about = {"evaluation": "linear", "share": 0.0, "dataset": "", "results": {}}
    images = ImageCounts(num_classes=4, num_train=40, num_test=20)
    ours = Ours.of_run(recipe, step=100, images=images, **about)
    assert ours.epochs == 100 * 12 / 40 and ours.cells()["epochs"] == 30


def test_a_run_has_figures_of_its_newest_checkpoint_on_its_own_images_only(
    tmp_path, tars, image_folder
):
    recipe = small_recipe(tmp_path, tars, "run.steps=4", "run.checkpoint_every=2")
    pretrain(recipe)
    run_dir = Path(recipe.run.dir)

    def kept():
        return json.loads((run_dir / "results.json").read_text())

    before = kept()
    gallery = (run_dir / run_layout.GALLERY_FILE).read_bytes()
    evaluate("knn", [str(list_checkpoints(run_dir)[0])], [])
    evaluate("linear", [str(list_checkpoints(run_dir)[0])], SHORT)
    evaluate_groups([str(list_checkpoints(run_dir)[0])], [])
    evaluate("knn", [str(run_dir)], [f"data.path={image_folder}"])
    assert kept() == before and (run_dir / run_layout.GALLERY_FILE).read_bytes() == gallery
    assert len(list((run_dir / "evaluations").iterdir())) == 4
    evaluate("knn", [str(run_dir)], ["evaluation.k=3"])
    assert kept() == before | {"knn": results(run_dir, "knn")["figures"]}


def test_a_method_without_momentum_net_has_none_to_evaluate(tmp_path):
    with pytest.raises(UserError, match=r"method\.name=simclr has no momentum net"):
        small_recipe(tmp_path, "x", "method.name=simclr", "evaluation.net=momentum")


def test_the_learning_rate_is_chosen_on_held_out_images_and_never_on_test_images(tmp_path, run_dir):
    # Dark and bright images, in the test set the other way round: what learns is wrong there.
    for split, dark, bright in (("train", "a", "b"), ("test", "b", "a")):
        for number in range(16):
            for name, grey in ((dark, 40), (bright, 215)):
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                image = Image.new("RGB", (24, 24), (grey + number % 5,) * 3)
                image.save(tmp_path / split / name / f"{number}.png")
    own = [f"data.path={tmp_path}", "linear.held_out=0.25", "linear.learning_rates=[1e-60, 1.0]"]
    evaluate("linear", [str(run_dir)], [*SHORT, *own])
    figures = results(run_dir, "linear")["figures"]
    assert figures["learning_rate"] == 1.0 and figures["top1"] < 0.2
    assert figures["top1_at_1e-60"] == 0.5


def test_other_weights_have_another_hash():
    torch.manual_seed(0)
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert backbone_sha256(one.state_dict()) != backbone_sha256(two.state_dict())
    two.load_state_dict(one.state_dict())
    assert backbone_sha256(one.state_dict()) == backbone_sha256(two.state_dict())


def test_the_projector_shows_all_classes_of_a_folder(run_dir, image_folder, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    write_features([str(copy)], [f"features.path={image_folder}", "features.projector=10"])
    for board in (copy / "tensorboard").rglob("metadata.tsv"):
        words = board.read_text().split()
        assert len(words) == 10 and len(set(words)) == 4


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (np.zeros((6, 4), np.float32), np.arange(5)),
        (np.zeros((6, 4), np.float32), np.full(6, -1)),
        (np.zeros((6, 4), np.float32), np.array(list("abcdef"))),
        (np.zeros((6, 2, 2), np.float32), np.arange(6)),
        (np.zeros((6, 4), np.int64), np.arange(6)),
    ],
)
def test_features_of_others_that_are_none_are_refused_in_a_line(tmp_path, features, labels):
    np.savez(tmp_path / "other.npz", features=features, labels=labels)
    with pytest.raises(UserError, match=r"other\.npz: "):
        evaluate_groups([str(tmp_path / "other.npz")], [])


def test_a_folder_gives_what_its_tars_give(run_dir, image_folder):
    evaluate("knn", [str(run_dir)], [])
    of_tars = results(run_dir, "knn")
    evaluate("knn", [str(run_dir)], [f"data.path={image_folder}"])
    of_folder = results(run_dir, "knn")
    assert of_folder["figures"] == of_tars["figures"]
    assert of_folder["checkpoint_sha256"] == of_tars["checkpoint_sha256"]
    assert of_folder["figures"]["pixel_mean"] == pytest.approx([123.675, 116.28, 103.53])


def test_a_run_trained_by_any_loader_can_be_evaluated(run_dir):
    figures = []
    for loader in ("torch", "memory"):
        evaluate("linear", [str(run_dir)], [*SHORT, "data.workers=0", f"data.loader={loader}"])
        figures.append(results(run_dir, "linear")["figures"])
    assert figures[0] == figures[1]


def test_a_list_of_other_images_is_another_result(run_dir, image_folder, tmp_path):
    listing, folders = tmp_path / "list.txt", []
    names = sorted(path.name for path in (image_folder / "train").rglob("*.jpg"))
    short = ["finetune.epochs=1", "finetune.batch=4", f"finetune.share={4 / len(names)}"]
    for own in (names[::10], names[1::10]):
        listing.write_text("\n".join(own))
        evaluate(
            "finetune",
            [str(run_dir)],
            [*short, f"finetune.list={listing}", f"data.path={image_folder}"],
        )
        folders.append(results(run_dir, "finetune")["data_sha256"]["labelled_ids"])
    assert folders[0] != folders[1]
    assert len(list((run_dir / "evaluations").glob("finetune-*"))) >= 2


def test_fine_tuning_on_few_labels_takes_many_small_steps_and_says_how_many(
    run_dir, monkeypatch, capsys
):
    rates = []
    original = finetune.build_optimizer

    def build_optimizer(*args):
        optimizer = original(*args)
        rates.append(optimizer.param_groups[0]["lr"])
        return optimizer

    monkeypatch.setattr(finetune, "build_optimizer", build_optimizer)
    for epochs, steps in ((3, 3), (100, 100)):
        keys = ["finetune.share=0.2", f"finetune.epochs={epochs}"]  # 8 of 40 labels
        evaluate("finetune", [str(run_dir)], keys)
        said = capsys.readouterr().out
        assert f"finetune: 8 labelled images, {steps} steps of 8" in said
        assert ("fewer than 100 steps teach little" in said) == (steps < 100)
        assert results(run_dir, "finetune")["settings"]["finetune"]["batch"] == 8
    assert rates == pytest.approx([0.05 * 8 / 256] * 2)


def test_features_are_written_in_the_order_of_their_labels(run_dir, image_folder, tmp_path):
    both = [f"features.path={image_folder}", f"features.out={tmp_path / 'out'}"]
    write_features([str(run_dir)], both)
    features = np.load(tmp_path / "out" / "train-features.npy")
    labels = np.load(tmp_path / "out" / "train-labels.npy")
    assert features.shape == (40, 128) and features.dtype == np.float32
    assert np.bincount(labels).tolist() == [10] * 4
    write_features([str(run_dir)], [*both, "features.format=parquet", "features.split=train"])
    from pyarrow import parquet

    table = parquet.read_table(tmp_path / "out" / "train-features.parquet")
    assert np.allclose(np.stack(table["feature"].to_numpy()), features, atol=1e-6)
    assert table["sample"][0].as_py().endswith(".jpg") and table["label"].to_pylist() == [*labels]
    names = json.loads((tmp_path / "out" / "train-names.json").read_text())
    assert names["samples"] == table["sample"].to_pylist()
    of_folders = [Path(name).parent.name for name in names["samples"]]
    assert of_folders == [names["classes"][label] for label in labels]


def test_an_interrupted_linear_evaluation_goes_on(run_dir, monkeypatch, capsys):
    command = [*SHORT, "linear.learning_rates=[0.1, 1.0]", "linear.seed=1"]
    evaluate("linear", [str(run_dir)], command)
    straight = results(run_dir, "linear")["figures"]
    newest = max((run_dir / "evaluations").glob("linear-*"), key=lambda x: x.stat().st_mtime)
    weights = torch.load(newest / "trained-progress.pt", weights_only=True)
    for path in newest.iterdir():
        path.unlink()

    original = linear.random_crops

    def cut_short(*args):
        batches, num_steps = original(*args)

        def ending(steps):
            for step, batch in zip(steps, batches(steps), strict=True):
                if step == 8:
                    raise KeyboardInterrupt
                yield batch

        return ending, num_steps

    with monkeypatch.context() as patch:
        patch.setattr(linear, "random_crops", cut_short)
        with pytest.raises(KeyboardInterrupt):
            evaluate("linear", [str(run_dir)], command)
    evaluate("linear", [str(run_dir)], command)
    assert "going on after step 6" in capsys.readouterr().out
    assert results(run_dir, "linear")["figures"] == straight
    again = torch.load(newest / "trained-progress.pt", weights_only=True)
    assert again["step"] == weights["step"] == 20
    for name, value in weights["net"].items():
        assert torch.equal(value, again["net"][name])


def unlabelled(folder: Path) -> list[str]:
    for split in ("train", "test"):
        (folder / split).mkdir()
        for number in range(3):
            (folder / split / f"{number}.jpg").write_bytes(jpeg(20, 20, number))
    return [f"data.path={folder}"]


def other_classes(folder: Path) -> list[str]:
    for split, names in (("train", "ab"), ("test", "ac")):
        for number, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / "0.jpg").write_bytes(jpeg(20, 20, number))
        shard_folder(folder / split, folder / f"tars-{split}", split=split, workers=1)
    return [f"data.path={folder}"]


def test_a_method_without_groups_is_refused_before_an_image_is_read(run_dir, monkeypatch):
    monkeypatch.setattr(groups, "open_together", None)
    monkeypatch.setattr(EvaluationTask, "embed", None)
    with pytest.raises(UserError, match=r"method\.name=simclr has no groups"):
        groups.evaluate_groups([str(run_dir), str(run_dir)], ["method.name=simclr"])


@pytest.mark.parametrize(
    ("name", "keys", "opened"),
    [
        ("linear", SHORT, ["train", "test"]),
        ("finetune", ["finetune.share=0.2", "finetune.epochs=1"], ["train", "test"]),
        ("groups", [], ["train"]),
    ],
)
def test_an_evaluation_opens_each_split_once(
    run_dir, image_folder, monkeypatch, name, keys, opened
):
    found = []
    original = FolderDataset.__init__

    def init(self, path, sub_folder=""):
        found.append(sub_folder)
        original(self, path, sub_folder)

    monkeypatch.setattr(FolderDataset, "__init__", init)
    PROGRAMS[name]([str(run_dir)], [*keys, f"data.path={image_folder}"], False)
    assert found == opened


def no_test(folder: Path) -> list[str]:
    (folder / "train" / "a").mkdir(parents=True)
    (folder / "train" / "a" / "0.jpg").write_bytes(jpeg(20, 20, 0))
    return [f"data.path={folder}"]


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("linear", unlabelled, "linear needs labels"),
        ("finetune", other_classes, "classes of the training and the test images do not match: b"),
        ("knn", no_test, "has no split 'test' or 'val'"),
        ("linear", lambda _: ["model.width=2"], "does not hold a resnet_tiny of width 2"),
        ("linear", lambda _: ["model.backbone=resnet18"], "does not hold a resnet18"),
        ("linear", lambda _: ["linear.epoch=3"], "did you mean 'linear.epochs'"),
        ("linear", lambda _: ["lineer.epochs=3"], "no section 'lineer'"),
        ("linear", lambda _: ["linear.setting=mocov3"], "linear.setting"),
        ("finetune", lambda _: ["finetune.list=x.txt"], "names files, which tars do not keep"),
        ("knn", lambda _: ["data.path=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, run_dir, name, make, words):
    with pytest.raises(UserError) as refusal:
        PROGRAMS[name]([str(run_dir)], make(tmp_path), False)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.launcher
def test_deepspeeds_launcher_finds_what_one_process_finds(run_dir, tmp_path):
    """It gives ranks what torchrun gives them, and an argument more."""
    program, own = str(ROOT / "launcher" / "evaluate.py"), [*SHORT, "linear.seed=7"]
    evaluate("linear", [str(run_dir)], own)
    expected = results(run_dir, "linear")
    folder = max((run_dir / "evaluations").glob("linear-*"), key=lambda x: x.stat().st_mtime)
    weights = torch.load(folder / "trained-progress.pt", weights_only=True)["net"]
    for path in folder.iterdir():
        path.unlink()
    launcher = ["deepspeed", "--num_gpus=2", f"--master_port={free_port()}"]
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = [*launcher, program, "linear", str(run_dir), *own]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert results(run_dir, "linear")["figures"]["top5"] == expected["figures"]["top5"]
    again = torch.load(folder / "trained-progress.pt", weights_only=True)["net"]
    for name, value in weights.items():
        assert torch.allclose(value, again[name], atol=1e-4 * value.abs().max().item() + 1e-6)


def test_a_folder_with_an_equals_sign_is_a_checkpoint(tmp_path, monkeypatch):
    given = []
    monkeypatch.setitem(PROGRAMS, "knn", lambda *arguments: given.append(arguments))
    (tmp_path / "lr=0.1").mkdir()
    rates = f"linear.learning_rates={[0.1] * 99}"  # longer than a file's name may be
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "knn", "lr=0.1", "evaluation.k=5", rates])
    assert not ended.value.code
    assert given == [(["lr=0.1"], ["evaluation.k=5", rates], False)]
