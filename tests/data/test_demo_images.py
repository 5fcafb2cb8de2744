"""Promises of the built-in image set."""

import numpy as np
import pytest

from scale_smog.data.images import decode
from scale_smog.data.prepare import demo as demo_images
from scale_smog.data.prepare.demo import CLASSES, OUTLINES, draw, make_demo
from scale_smog.data.tar_dataset import TarDataset


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(demo_images, "NUM_IMAGES", {"train": 30, "test": 10})


def test_there_are_ten_classes_in_the_documented_order():
    names = "disc ring square triangle star plus heart crescent arrow L"
    assert CLASSES == tuple(names.split())


@pytest.mark.parametrize("class_index", range(10))
def test_an_image_is_a_function_of_its_class_and_generator(class_index):
    image = draw(class_index, _rng(0, class_index))
    assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
    assert np.array_equal(image, draw(class_index, _rng(0, class_index)))
    assert not np.array_equal(image, draw(class_index, _rng(1, class_index)))


@pytest.mark.parametrize("name", CLASSES)
def test_outlines_lie_in_the_unit_circle_and_fill_it(name):
    radii = np.hypot(*OUTLINES[name].T)
    assert radii.max() <= 1.03
    assert radii.max() > 0.9


def test_outlines_cover_different_shares_of_a_disc():
    """A wrong winding or arc shows here: areas by the shoelace formula."""
    areas = {}
    for name, points in OUTLINES.items():
        x, y = points.T
        areas[name] = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2 / np.pi
    assert areas["disc"] == pytest.approx(1, abs=0.01)
    assert areas["ring"] == pytest.approx(1 - 0.55**2, abs=0.01)
    assert areas["square"] == pytest.approx(2 / np.pi, abs=0.01)
    assert areas["triangle"] == pytest.approx(3 * 3**0.5 / 4 / np.pi, abs=0.02)
    assert areas["crescent"] == pytest.approx(0.44, abs=0.05)


def test_places_are_inside_apart_and_of_every_number():
    params = set()
    for seed in range(60):
        places = demo_images._places(_rng(seed))
        params.add(len(places))
        for index, (x, y, radius) in enumerate(places):
            assert 8 <= radius <= 13
            assert radius <= min(x, y) and max(x, y) <= 64 - radius
            for a, b, r in places[:index]:
                assert np.hypot(x - a, y - b) >= radius + r
    assert params == {4, 5, 6, 7}


def test_copies_stand_out_from_the_background_in_luminance():
    for seed in range(100):
        rng = _rng(seed)
        background = rng.random(3)
        step = (demo_images._contrasting(background, rng) - background) @ [0.299, 0.587, 0.114]
        assert abs(step) >= 0.22


def test_both_splits_are_balanced_disjoint_and_match_their_labels(few_images, tmp_path):
    make_demo(tmp_path / "demo")
    train, test = (TarDataset(tmp_path / "demo", split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [3] * 10
    assert np.bincount(test.labels).tolist() == [1] * 10
    assert train.classes == test.classes == CLASSES
    images = [d.read(i) for d in (train, test) for i in range(d.num_samples)]
    assert len(set(images)) == 40

    # Test image 4 is the star of index 4: the label must say so, and the pixels be that drawing.
    content = test.read(int(np.flatnonzero(test.labels == 4)[0]))
    drawn = draw(4, _rng(0, 1, 4)).astype(float)
    decoded = decode(content)
    assert (decoded.format, decoded.size) == ("JPEG", (64, 64))
    assert np.abs(np.asarray(decoded) - drawn).mean() < 8


def test_making_it_again_leaves_it_as_it_is(few_images, tmp_path, capsys):
    make_demo(tmp_path / "demo")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").iterdir()}
    make_demo(tmp_path / "demo")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").iterdir()} == times
    assert "has the split 'test' already" in capsys.readouterr().err


def test_another_seed_draws_other_images(few_images, tmp_path):
    make_demo(tmp_path / "0", seed=0)
    make_demo(tmp_path / "1", seed=1)
    first, second = (TarDataset(tmp_path / name, "train") for name in "01")
    images = [{d.read(i) for i in range(30)} for d in (first, second)]
    assert not images[0] & images[1]
