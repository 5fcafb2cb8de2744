"""Views as parameters: what is sampled, and how it is distributed."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from scale_smog.config import AugmentConfig, DataConfig
from scale_smog.data import EpochPlan
from scale_smog.data.augment import CentreView, RandomView, blur_window, training_views
from scale_smog.data.loaders.batch_source import BatchSource

NUM = 20_000


def params(view, num=NUM, width=500, height=375, seed=0, epoch=0):
    ids = np.arange(num)
    sizes = np.full(num, width), np.full(num, height)
    return view.sample(seed, ids, np.full(num, epoch), *sizes)


def large(augment=None, blur=1.0, solarize=0.0, scale=(0.2, 1.0), stream=0):
    return RandomView(augment or AugmentConfig(), stream, 224, scale, blur, solarize)


def test_the_two_schemes_are_the_papers():
    views = training_views(DataConfig(path="", num_small_crops=4), AugmentConfig())
    assert [v.px for v in views] == [224, 224, 96, 96, 96, 96]
    assert [v.small for v in views] == [False, False, True, True, True, True]
    assert [(v.blur, v.solarize) for v in views[:3]] == [(1.0, 0.0), (0.1, 0.2), (0.1, 0.2)]
    assert [v.scale for v in views[1:3]] == [(0.2, 1.0), (0.05, 0.2)]
    assert (blur_window(224), blur_window(96)) == (23, 9)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (lambda n: n.flip, 0.5),
        (lambda n: n.sigma > 0, 0.1),
        (lambda n: n.solarize, 0.2),
        # grey: all rows of the colour matrix are equal
        (lambda n: np.ptp(n.colour, axis=1).max(axis=1) < 1e-6, 0.2),
        # neither jittered nor grey
        (lambda n: np.abs(n.colour - np.eye(3)).max(axis=(1, 2)) < 1e-6, 0.2 * 0.8),
    ],
    ids=["flip", "blur", "solarize", "grey", "untouched"],
)
def test_probabilities_are_as_configured(rate, expected):
    share = rate(params(large(blur=0.1, solarize=0.2))).mean()
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / NUM)


def test_crops_are_distributed_as_torchvisions():
    box = params(large()).box.astype(np.int64)
    left, top, width, height = box.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 500).all() and (top + height <= 375).all()

    from scipy.stats import ks_2samp  # seconds to import

    image = torch.empty(3, 375, 500)
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(5000)]
    their_top, their_left, their_height, their_width = np.array(theirs).T
    for ours, other in [
        (width * height, their_width * their_height),
        (width / height, their_width / their_height),
        (left, their_left),
        (top, their_top),
    ]:
        assert ks_2samp(ours, other).pvalue > 1e-3


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3000, 2), (2, 3000)])
def test_an_odd_image_still_has_a_crop(width, height):
    left, top, w, h = params(large(), 100, width, height).box.T
    assert (w >= 1).all() and (h >= 1).all()
    assert (left + w <= width).all() and (top + h <= height).all()


def test_views_of_an_image_differ_and_repeat_only_for_the_same_seed_epoch_and_stream():
    one = params(large(), 50)
    again = params(large(), 50)
    assert all((getattr(one, f) == getattr(again, f)).all() for f in vars(one))
    others = [
        params(large(stream=1), 50),
        params(large(), 50, seed=1),
        params(large(), 50, epoch=1),
    ]
    assert all((one.box != other.box).any(axis=1).mean() > 0.9 for other in others)


def test_the_blurs_sigma_is_uniform_between_a_tenth_and_two_pixels():
    from scipy.stats import kstest

    sigma = params(large(blur=1.0)).sigma
    assert kstest(sigma, "uniform", args=(0.1, 1.9)).pvalue > 1e-3


def test_crops_lie_anywhere_with_equal_odds():
    """Of a square crop in a wide image: its place among those there are."""
    from scipy.stats import kstest

    view = large(scale=(0.2, 0.2))
    left, top, width, height = params(view, width=4000, height=3000).box.astype(float).T
    for place in (left / (4000 - width), top / (3000 - height)):
        assert kstest(place, "uniform").pvalue > 1e-3


def recolour(n, i, pixels):
    """What the params of view i do to an image [M, 3], without the clip."""
    return pixels @ n.colour[i].T + n.from_mean[i] @ pixels.mean(0) + n.offset[i]


def only(**strengths):
    zero = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    return AugmentConfig(jitter=1.0, grey=0.0, **(zero | strengths))


PIXELS = np.random.default_rng(0).uniform(0, 255, (64, 3))


def test_brightness_adds_the_same_everywhere():
    n = params(large(only(brightness=0.4)), 500)
    change = np.array([recolour(n, i, PIXELS) - PIXELS for i in range(500)])
    assert np.ptp(change, axis=(1, 2)).max() < 1e-3
    assert abs(np.abs(change).max() - 0.4 * 255) < 2


def test_contrast_stretches_about_each_channels_mean():
    n = params(large(only(contrast=0.4)), 500)
    for i in range(20):
        new = recolour(n, i, PIXELS)
        factor = (new - PIXELS.mean(0)) / (PIXELS - PIXELS.mean(0))
        assert np.ptp(factor) < 1e-2 and 0.6 <= factor.mean() <= 1.4


def test_saturation_keeps_the_luma():
    n = params(large(only(saturation=0.2)), 20)
    luma = np.array([0.299, 0.587, 0.114])
    for i in range(20):
        new = recolour(n, i, PIXELS)
        assert np.abs((new - PIXELS) @ luma).max() < 1e-2
        chroma = (new - (new @ luma)[:, None]) / (PIXELS - (PIXELS @ luma)[:, None])
        assert np.ptp(chroma) < 1e-2 and 0.8 <= chroma.mean() <= 1.2


def test_hue_turns_the_chroma_plane_by_at_most_a_tenth_of_the_circle():
    n = params(large(only(hue=0.1)), 500)
    to_yiq = np.array(
        [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]
    )
    red = np.array([200.0, 60.0, 60.0])
    before, after = to_yiq @ red, (n.colour @ red) @ to_yiq.T  # [3], [500, 3]
    assert np.abs(after[:, 0] - before[0]).max() < 0.1  # the luma stays
    angle = np.angle((after[:, 1] + 1j * after[:, 2]) / (before[1] + 1j * before[2]), deg=True)
    assert 35 < angle.max() < 36.1 and -36.1 < angle.min() < -35


def test_the_evaluation_crop_is_the_centre():
    n = params(CentreView(224, 0.875), 1, width=500, height=400)
    assert n.box.tolist() == [[75, 25, 350, 350]]
    assert not n.flip.any() and not n.solarize.any() and not n.sigma.any()


def test_parameters_drawn_for_many_steps_are_those_of_each_alone():
    sizes = np.random.default_rng(0).integers(40, 400, (2, 3000))
    images: Any = SimpleNamespace(widths=sizes[0], heights=sizes[1])
    views = [large(), large(stream=1, blur=0.1, solarize=0.2)]
    source = BatchSource(images, EpochPlan(3000, 600), views, seed=5, rank=1, world_size=3)
    together = source.params_from(3)  # five steps a draw, over the end of an epoch
    for step in range(3, 16):
        for ours, alone in zip(next(together), source.augmentation_params(step), strict=True):
            for name, value in vars(alone).items():
                np.testing.assert_array_equal(getattr(ours, name), value)
