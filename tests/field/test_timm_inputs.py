"""Nets of timm as users choose them: any image size, no randomness, their own files."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_recipe import small_recipe
from timm_sweep import try_name
from torch import nn

from scale_smog.config import ModelConfig
from scale_smog.errors import UserError
from scale_smog.models import build_backbone, siamese
from scale_smog.models.check import batch_norm_images, require_images_fit
from scale_smog.models.weights import load_weights, without_classifier
from scale_smog.pretrain import pretrain


# One of each kind: functional dropout, a classifier's place that holds parts of the backbone, a
# position embedding, windows, a size that cannot change.
@pytest.mark.parametrize(
    ("name", "takes_96_px"),
    [
        ("ghostnet_100", True),
        ("mobilenetv3_small_050", True),
        ("convnext_atto", True),
        ("edgenext_xx_small", True),
        ("mambaout_femto", True),
        ("levit_128s", False),
        ("vit_tiny_patch16_224", True),
        ("pit_ti_224", False),
    ],
)
def test_a_name_works_or_is_refused_before_training(name, takes_96_px):
    outcome = try_name(name)
    assert outcome.is_good and (not outcome.refusal) == takes_96_px


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",  # position embedding
        "deit_tiny_distilled_patch16_224",  # two tokens before it
        "swinv2_cr_tiny_ns_224",  # windows
        "swin_s3_tiny_224",
        "xcit_nano_12_p16_224",
    ],
)
def test_transformers_take_small_images(name):
    sizes_px = {"data.large_px": 96, "data.small_px": 32}
    require_images_fit(ModelConfig(backbone=name), sizes_px, batch=4)


def test_another_size_leaves_the_features_of_the_own_size_alone():
    torch.manual_seed(0)
    ours = build_backbone("vit_tiny_patch16_224").eval()
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), plain(images))


def test_a_net_whose_own_size_is_no_multiple_of_its_patch_keeps_its_own_size():
    name = "vit_so400m_patch14_siglip_384"
    with torch.device("meta"):
        net = build_backbone(name)
        assert net(torch.empty(2, 3, 384, 384)).shape == (2, net.num_features)


@pytest.mark.parametrize(
    ("name", "key", "px", "words"),
    [
        ("mixer_s16_224", "data.small_px", 32, "images of data.small_px=32 .*own size is 224 px"),
        ("levit_128s", "data.large_px", 96, "images of data.large_px=96 .*own size is 224 px"),
        ("vit_small_patch14_dinov2", "data.small_px", 96, "divisible by patch size"),
        ("coat_lite_tiny", "data.large_px", 224, "uses weights in several places"),
        ("gemma4_vit_167m_enc", "data.large_px", 768, "makes no features .* of images"),
    ],
)
def test_a_size_that_a_net_cannot_take_is_one_line(name, key, px, words):
    with pytest.raises(UserError, match=words) as refusal:
        require_images_fit(ModelConfig(backbone=name), {key: px}, batch=2)
    assert "\n" not in str(refusal.value)


def test_a_net_that_draws_random_numbers_is_refused(monkeypatch):
    monkeypatch.setattr("scale_smog.models.timm_nets._without_randomness", lambda net: net)
    with pytest.raises(UserError, match=r"ghostnet_100 draws random numbers .*bernoulli"):
        require_images_fit(ModelConfig(backbone="ghostnet_100"), {"data.large_px": 64}, batch=2)


def test_dropout_of_every_kind_is_turned_off(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda *args, **kwargs: create(
            *args, **kwargs, drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5
        ),
    )
    require_images_fit(ModelConfig(backbone="vit_tiny_patch16_224"), {"data.large_px": 64}, batch=2)


def test_position_embeddings_without_noise_in_training():
    model = ModelConfig(backbone="vit_base_patch16_sapiens2")
    require_images_fit(model, {"data.large_px": 64}, batch=2)


class WithClassifier(nn.Sequential):
    """A net that kept its classifier, which makes no feature."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(5, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[2](self[1](self[0](x)))


def test_a_net_with_weights_that_no_gradient_reaches_is_refused_by_their_name(monkeypatch):
    monkeypatch.setattr(siamese, "build_backbone", lambda *_, **__: WithClassifier())
    with pytest.raises(UserError, match=r"do not depend on, such as fc\.weight, and engines wait"):
        require_images_fit(ModelConfig(backbone="theirs"), {"data.large_px": 64}, batch=2)


def test_a_run_with_multi_crop_and_a_vit_ends(tmp_path, tars):
    overrides = ["model.backbone=vit_tiny_patch16_224", "data.num_small_crops=1", "run.steps=2"]
    sizes = ["data.large_px=64", "data.small_px=32", "evaluation.image_px=64", "optimizer.name=sgd"]
    recipe = small_recipe(tmp_path, tars, *overrides, *sizes, "evaluation.num_train_images=8")
    pretrain(recipe)
    assert (Path(recipe.run.dir) / "results.json").exists()


def test_a_run_of_a_net_of_one_size_ends_before_it_begins(tmp_path, tars):
    recipe = small_recipe(tmp_path, tars, "model.backbone=mixer_s16_224", "data.large_px=32")
    with pytest.raises(UserError, match=r"mixer_s16_224 does not take images of data\.large_px=32"):
        pretrain(recipe)
    assert not Path(recipe.run.dir).exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.global_batch=1"],
        ["data.global_batch=12", "engine.accumulate=12"],
    ],
)
def test_a_batch_of_one_image_under_batch_norm_is_one_line(tmp_path, tars, overrides):
    small = ["grouping.num_groups=2", "grouping.reset_every=4", "grouping.init=random"]
    recipe = small_recipe(tmp_path, tars, *overrides, *small)
    with pytest.raises(UserError, match="batch norm sees 1 image at a time and needs two"):
        pretrain(recipe)
    assert not Path(recipe.run.dir).exists()


@pytest.mark.parametrize(("scope", "images"), [("global", 16), ("node", 8), (2, 4), ("local", 2)])
def test_batch_norm_sees_the_images_of_the_ranks_that_share_it(scope, images):
    model = ModelConfig(batch_norm=scope)
    assert batch_norm_images(model, batch=2, world_size=8, ranks_per_node=4) == images
    assert batch_norm_images(model, batch=2, world_size=1, ranks_per_node=4) <= images


@pytest.mark.parametrize("name", ["resnet26", "repvit_m0_9"])
def test_a_net_reads_the_file_that_timm_writes_of_it(tmp_path, name):
    theirs = timm.create_model(name)
    weights = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    net = build_backbone(name)
    load_weights(net, tmp_path / "a.safetensors")
    theirs.reset_classifier(0)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize(
    "name",
    [
        *("convnext_tiny", "edgenext_small", "hgnetv2_b0", "mambaout_tiny", "hiera_tiny_224"),
        *("resnet50_clip", "levit_128", "convformer_s18", "shvit_s1", "efficientvit_b0"),
        *("deit_tiny_distilled_patch16_224", "mobilenetv4_conv_small", "swin_tiny"),
    ],
)
def test_of_a_file_only_the_classifier_is_left_out(name):
    timm_name = "swin_tiny_patch4_window7_224" if name == "swin_tiny" else name
    with torch.device("meta"):
        net, theirs = build_backbone(name), timm.create_model(timm_name)
    assert theirs.state_dict().keys() > net.state_dict().keys()
    assert without_classifier(theirs.state_dict(), net).keys() == net.state_dict().keys()


def test_a_file_without_the_norm_before_the_classifier_is_refused(tmp_path):
    weights = build_backbone("convnext_atto").state_dict()
    del weights["head.norm.weight"]
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"head\.norm\.weight is missing"):
        load_weights(build_backbone("convnext_atto"), tmp_path / "a.safetensors")
