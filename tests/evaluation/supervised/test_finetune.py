"""Fine-tuning as SimCLR and SwAV do it."""

import pytest
import torch
from torch import nn

from scale_smog import distributed
from scale_smog.evaluation.protocols import load_protocols
from scale_smog.evaluation.supervised.finetune import (
    Classifier,
    build_optimizer,
    lr_schedule,
    with_batch_of_labels,
)


def test_backbone_and_classifier_have_rates_of_their_own_for_256_images():
    net = Classifier(nn.Linear(3, 4), 4, 2)
    swav = load_protocols(["finetune.setting=swav", "finetune.share=0.01"]).finetune
    backbone, head = build_optimizer(swav, net).param_groups
    assert (backbone["lr"], head["lr"]) == (0.02, 5.0)  # eval_semisup.py, 1 %
    assert backbone["params"] == list(net.backbone.parameters())
    simclr = load_protocols(["finetune.batch=1024"]).finetune
    assert [group["lr"] for group in build_optimizer(simclr, net).param_groups] == [0.2, 0.2]


def test_rates_fall_at_swavs_milestones_or_along_a_cosine():
    swav = load_protocols(["finetune.setting=swav"]).finetune  # epochs 12 and 16 of 20
    factor = lr_schedule(swav, num_steps=200)
    assert [factor(step) for step in (0, 119, 120, 159, 160)] == pytest.approx(
        [1, 1, 0.2, 0.2, 0.04]
    )
    factor = lr_schedule(load_protocols().finetune, num_steps=200)
    assert [factor(step) for step in (0, 100, 200)] == pytest.approx([1, 0.5, 0])


def test_a_classifier_begins_without_an_opinion():
    net = Classifier(nn.Identity(), 4, 2)
    assert torch.equal(net(torch.randn(3, 4)), torch.zeros(3, 2))


def test_a_batch_is_at_most_the_labelled_images_and_as_many_on_each_rank(monkeypatch):
    config = load_protocols(["finetune.batch=64"]).finetune
    assert with_batch_of_labels(config, 1000).batch == 64
    assert with_batch_of_labels(config, 41).batch == 41
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    assert with_batch_of_labels(config, 41).batch == 40
    assert with_batch_of_labels(config, 3).batch == 4
