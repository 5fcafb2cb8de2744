"""Segmentation and detection, on small sets in the datasets' own layouts."""

import contextlib
import io
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from dense_sets import write_cityscapes, write_coco, write_voc
from torch import distributed as dist

from scale_smog import distributed
from scale_smog.errors import UserError
from scale_smog.evaluation.dense import detection, detection_data, segmentation
from scale_smog.evaluation.dense.detection import as_results, average_precision
from scale_smog.evaluation.dense.detection_data import (
    DetectionImages,
    TrainingSamples,
    open_detection,
)
from scale_smog.evaluation.dense.feature_maps import dilate, require_resnet
from scale_smog.evaluation.dense.segmentation import build_fcn
from scale_smog.evaluation.dense.segmentation_data import normalised, open_segmentation
from scale_smog.evaluation.program import evaluate
from scale_smog.evaluation.protocols import load_protocols
from scale_smog.models import build_backbone

AP = ("ap", "ap50", "ap75")
SEGMENT = [
    "segmentation.train_split=train",
    "segmentation.crop_px=40",
    "segmentation.steps=12",
    "segmentation.batch=3",
    "segmentation.rate=0.05",
    "segmentation.workers=0",
    "segmentation.checkpoint_every=4",
]
DETECT = [
    "detection.shorter_px=[48, 64]",
    "detection.test_px=56",
    "detection.longer_px=96",
    "detection.steps=10",
    "detection.milestones=[9]",
    "detection.warmup=1",
    "detection.batch=2",
    "detection.rate=0.01",
    "detection.workers=0",
    "detection.checkpoint_every=4",
]


def task_folder(run_dir: Path, name: str) -> Path:
    (folder,) = (run_dir / "evaluations").glob(f"{name}-*")
    return folder


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def interrupt_after(num_steps: int, module, monkeypatch) -> None:
    """The next training of `module` ends as by Ctrl-C before its step `num_steps`."""
    original = module.training_batches

    def training_batches(*args):
        def batches(steps):
            for step, batch in zip(steps, original(*args)(steps), strict=True):
                if step == num_steps:
                    raise KeyboardInterrupt
                yield batch

        return batches

    monkeypatch.setattr(module, "training_batches", training_batches)


@pytest.fixture
def every_loss(monkeypatch):
    monkeypatch.setattr("scale_smog.evaluation.training.LOG_EVERY", 1)


def test_dilated_maps_are_those_of_torchvision():
    ours = build_backbone("resnet50")
    other = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    other.load_state_dict(ours.state_dict(), strict=False)
    other.fc = torch.nn.Identity()
    dilate(ours)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(images), other.eval()(images), atol=1e-5)


def test_a_net_without_maps_is_refused_by_name():
    net = build_backbone("mobilenetv3_small_100")
    with pytest.raises(UserError, match=r"segmentation needs a ResNet.* MobileNetV3"):
        require_resnet(net, "segmentation")


def test_learning_rates_follow_the_published_schedules():
    config = load_protocols().detection  # 1x: tenths after 60,000 and 80,000 steps
    steps = (0, 250, 500, 59_999, 60_000, 80_000)
    factors = [detection.lr_factor(config, step) for step in steps]
    assert factors == pytest.approx([1 / 501, 251 / 501, 1, 1, 0.1, 0.01])
    factors = [segmentation.polynomial(step, 200) for step in (0, 100, 200)]
    assert factors == pytest.approx([1, 0.5**0.9, 0])


def test_fcn_learns_resumes_and_reports_what_its_predictions_give(
    tmp_path, run_dir, every_loss, monkeypatch
):
    command = [*SEGMENT, f"segmentation.path={write_voc(tmp_path)}"]
    evaluate("segmentation", [str(run_dir)], command)
    folder = task_folder(run_dir, "segmentation")
    course = losses(folder)
    assert len(course) == 12 and np.mean(course[-3:]) < 0.7 * np.mean(course[:3])
    results = json.loads((folder / "results.json").read_text())
    straight = torch.load(folder / "fcn-progress.pt", weights_only=True)["net"]

    # The same figures from the weights, by a table of pixels.
    config = load_protocols(command).segmentation
    net = build_fcn(build_backbone("resnet_tiny"), 21)
    net.load_state_dict(straight)
    images, table = open_segmentation(config, "val"), np.zeros((21, 21))
    for index in range(len(images.pairs)):
        image, classes = images.load(index)
        with torch.no_grad():
            predicted = net.eval()(normalised(image)[None])["out"][0].argmax(0)
        counted = classes != 255
        np.add.at(table, (classes[counted].numpy(), predicted[counted].numpy()), 1)
    hit, wanted, found = np.diag(table), table.sum(1), table.sum(0)
    there = (wanted + found) > 0
    miou = (hit[there] / (wanted + found - hit)[there]).mean()
    assert results["figures"]["miou"] == pytest.approx(miou, abs=1e-6)
    macc = (hit[there] / np.maximum(wanted[there], 1)).mean()
    assert results["figures"]["macc"] == pytest.approx(macc, abs=1e-6)
    assert results["settings"]["segmentation"]["batch"] == 3 and len(results["data_sha256"]) == 2

    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        interrupt_after(6, segmentation, patch)
        with pytest.raises(KeyboardInterrupt):
            evaluate("segmentation", [str(run_dir)], command)
    evaluate("segmentation", [str(run_dir)], command)
    resumed = torch.load(folder / "fcn-progress.pt", weights_only=True)["net"]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert len(losses(folder)) == 6 + 8  # from the checkpoint of step 4


def test_cityscapes_is_read_in_its_own_layout_and_learned(tmp_path, run_dir, every_loss):
    path = write_cityscapes(tmp_path)
    named = ["segmentation.setting=cityscapes", f"segmentation.path={path}"]
    config = load_protocols(named).segmentation
    assert (config.crop_px, config.steps, config.train_split) == (769, 40_000, "train")
    images = open_segmentation(config, "train")
    classes = images.load(0)[1].unique().tolist()
    assert images.num_classes == 19 and set(classes) <= {0, 1, 2, 255} and 255 in classes
    evaluate("segmentation", [str(run_dir)], [*SEGMENT, *named])
    newest = max((run_dir / "evaluations").glob("segmentation-*"), key=lambda x: x.stat().st_mtime)
    course = losses(newest)
    assert np.mean(course[-3:]) < 0.7 * np.mean(course[:3])


def test_mask_rcnn_learns_and_goes_on_after_an_interruption(
    tmp_path, run_dir, every_loss, monkeypatch
):
    monkeypatch.setattr(detection, "PYRAMID_CHANNELS", 16)  # for a CPU
    monkeypatch.setattr(detection, "BOX_FEATURES", 64)
    command = [*DETECT, f"detection.path={write_coco(tmp_path / 'coco')}"]
    with monkeypatch.context() as patch:
        interrupt_after(6, detection, patch)
        with pytest.raises(KeyboardInterrupt):
            evaluate("detection", [str(run_dir)], command)
    folder = task_folder(run_dir, "detection")
    assert torch.load(folder / "mask_rcnn-progress.pt", weights_only=True)["step"] == 4
    evaluate("detection", [str(run_dir)], command)
    course = losses(folder)
    assert len(course) == 6 + 6 and np.mean(course[-3:]) < 0.8 * np.mean(course[:3])
    # What was done twice came out alike.
    assert course[4:6] == pytest.approx(course[6:8], abs=1e-5)
    figures = json.loads((folder / "results.json").read_text())["figures"]
    assert set(figures) == {f"{kind}_{x}" for kind in ("box", "mask") for x in AP}


def detector_output(images: DetectionImages, index: int) -> dict[str, torch.Tensor]:
    """What a fair detector would say: boxes moved by a pixel or two, some of a wrong class."""
    generator = torch.Generator().manual_seed(index)
    found = images.objects(images.ids[index])
    boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([1 + images.categories.index(a["category_id"]) for a in found])
    labels[0] = labels[0] % 3 + 1 if index % 2 else labels[0]
    masks = torch.stack([torch.from_numpy(images.coco.annToMask(a)) for a in found]).roll(1, dims=2)
    return {
        "boxes": boxes + 4 * torch.rand(boxes.shape, generator=generator),
        "labels": labels,
        "scores": torch.rand(len(found), generator=generator),
        "masks": masks[:, None].float(),
    }


def test_average_precision_is_that_of_pycocotools_and_torchmetrics(tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from torchmetrics.detection import MeanAveragePrecision

    coco = write_coco(tmp_path)
    config = load_protocols([f"detection.path={coco}"]).detection
    images, oracle = open_detection(config, "val2017"), MeanAveragePrecision(iou_type="bbox")
    found = []
    for index, image_id in enumerate(images.ids):
        output = detector_output(images, index)
        found += as_results(images, image_id, dict(output, boxes=output["boxes"].clone()))
        truth = TrainingSamples(images)(index, seed=0)[1]
        width = images.coco.imgs[image_id]["width"]
        mirrored = not torch.equal(
            truth["masks"][0], torch.from_numpy(images.coco.annToMask(images.objects(image_id)[0]))
        )
        if mirrored:
            truth["boxes"][:, [0, 2]] = width - truth["boxes"][:, [2, 0]]
        oracle.update([output], [{k: truth[k] for k in ("boxes", "labels")}])
    (tmp_path / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(coco / "annotations" / "instances_val2017.json"))
        loaded = truth.loadRes(str(tmp_path / "found.json"))
        for iou_type in ("bbox", "segm"):
            expected = COCOeval(truth, loaded, iou_type)
            expected.evaluate()
            expected.accumulate()
            expected.summarize()
            own = average_precision(images, found, iou_type)
            assert list(own.values()) == pytest.approx(expected.stats[:3].tolist(), abs=1e-12)
            assert 0.05 < own["ap"] < 0.95 and own["ap50"] >= own["ap75"]
    boxes = average_precision(images, found, "bbox")
    figures = oracle.compute()
    same = {"ap": "map", "ap50": "map_50", "ap75": "map_75"}
    for name, other in same.items():
        assert boxes[name] == pytest.approx(figures[other].item(), abs=1e-6)


def test_only_backbone_and_pyramid_are_in_bf16(monkeypatch):
    monkeypatch.setattr(detection, "PYRAMID_CHANNELS", 16)  # for a CPU
    monkeypatch.setattr(detection, "BOX_FEATURES", 64)
    config, seen = load_protocols(DETECT).detection, {}
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    net = detection.build_mask_rcnn(build_backbone("resnet_tiny"), 3, config, autocast)
    net.backbone.fpn.register_forward_hook(lambda m, x, y: seen.update(pyramid=y["0"].dtype))
    net.rpn.anchor_generator.register_forward_hook(lambda m, x, y: seen.update(anchors=y[0].dtype))
    net.rpn.register_forward_hook(lambda m, x, y: seen.update(proposals=y[0][0].dtype))
    image = torch.rand(3, 56, 72)
    truth = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 56, 72, dtype=torch.uint8),
    }
    losses = net.train()([image], [truth])
    assert seen == {
        "pyramid": torch.bfloat16,
        "anchors": torch.float32,
        "proposals": torch.float32,
    }
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    net.roi_heads.score_thresh = 0.0  # an untrained net finds something too
    (output,) = net.eval()([image])
    assert len(output["boxes"]) and output["boxes"].dtype == torch.float32


def test_a_batch_that_the_ranks_do_not_divide_is_named_by_its_own_key(
    tmp_path, run_dir, monkeypatch
):
    voc, coco = write_voc(tmp_path), write_coco(tmp_path / "coco")
    paths = {"segmentation": voc, "detection": coco}
    monkeypatch.setattr(distributed, "world_size", lambda: 12)
    for name, path in paths.items():
        keys = [f"{name}.path={path}"]
        keys += ["segmentation.train_split=train"] * (name == "segmentation")
        with pytest.raises(UserError, match=rf"^{name}\.batch=16 is not a multiple of 12 ranks"):
            evaluate(name, [str(run_dir)], keys)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "file", ["JPEGImages/2007_000003.jpg", "SegmentationClass/2007_000003.png"]
)
def test_an_image_that_cannot_be_read_is_one_line_from_a_worker_too(
    tmp_path, run_dir, file, workers
):
    path = write_voc(tmp_path) / "VOC2012" / file
    content = path.read_bytes()
    path.write_bytes(content[:60] + b"\0" * 200)  # Pillow calls that a SyntaxError in a PNG
    keys = [*SEGMENT, f"segmentation.path={path.parents[2]}"]
    with pytest.raises(UserError) as refusal:
        evaluate("segmentation", [str(run_dir)], [*keys, f"segmentation.workers={workers}"])
    line = str(refusal.value)
    assert line.startswith(f"cannot read {path}: ") and "\n" not in line


def test_annotations_are_parsed_once_a_split(tmp_path, run_dir, monkeypatch):
    opened = []
    original = detection_data.require_file

    def require_file(path, purpose):
        opened.append(path.name)
        return original(path, purpose)

    monkeypatch.setattr(detection_data, "require_file", require_file)
    monkeypatch.setattr(detection, "evaluate_detection", lambda *_: {})
    evaluate("detection", [str(run_dir)], [f"detection.path={write_coco(tmp_path / 'coco')}"])
    assert opened == ["instances_train2017.json", "instances_val2017.json"]


def missing_map(folder: Path) -> list[str]:
    devkit = write_voc(folder)
    (devkit / "VOC2012" / "SegmentationClass" / "2007_000003.png").unlink()
    return [f"segmentation.path={devkit}", "segmentation.train_split=train"]


def missing_list(folder: Path) -> list[str]:
    return [f"segmentation.path={write_voc(folder)}"]


def class_too_many(folder: Path) -> list[str]:
    devkit = write_voc(folder)
    from PIL import Image

    path = devkit / "VOC2012" / "SegmentationClass" / "2007_000000.png"
    Image.fromarray(np.full((56, 72), 33, dtype=np.uint8)).save(path)
    own = [x for x in SEGMENT if "steps" not in x]
    return [*own, "segmentation.steps=3", f"segmentation.path={devkit}"]


def missing_annotations(folder: Path) -> list[str]:
    coco = write_coco(folder / "coco")
    (coco / "annotations" / "instances_val2017.json").unlink()
    return [f"detection.path={coco}"]


def other_categories(folder: Path) -> list[str]:
    coco = write_coco(folder / "coco")
    path = coco / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace("thing17", "zebra"))
    return [f"detection.path={coco}"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (missing_map, "2007_000003.png"),
        (missing_list, "trainaug.txt: there are train, val"),
        (class_too_many, "has class 33, the set has 21"),
        (missing_annotations, "instances_val2017.json"),
        (other_categories, "do not match: thing17, zebra"),
        (lambda folder: ["segmentation.path=nowhere"], "segmentation.path='nowhere'"),
        (lambda folder: [f"detection.path={folder}"], "instances_train2017.json"),
    ],
)
def test_an_incomplete_set_is_one_line_that_names_what_is_missing(tmp_path, run_dir, make, words):
    overrides = make(tmp_path)
    name = overrides[0].split(".")[0]
    with pytest.raises(UserError) as refusal:
        evaluate(name, [str(run_dir)], overrides)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    assert not dist.is_initialized()
