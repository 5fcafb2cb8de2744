"""The kNN and the linear classifier on the views in training."""

import torch
import torch.nn.functional as F
from torch import nn

from scale_smog.evaluation.online import OnlineProbe


def views(num: int):
    """Large views [48, 3, 4, 4] and their labels; the class is the brightest colour."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(num):
        label = torch.randint(3, (48,), generator=generator)
        bright = F.one_hot(label, 3).float()[:, :, None, None]
        yield bright + 0.3 * torch.randn(48, 3, 4, 4, generator=generator), label


def test_it_learns_from_the_features_and_leaves_the_backbone_alone():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 16))
    before = [p.clone() for p in backbone.parameters()]
    probe, reports = OnlineProbe(16, 3, torch.device("cpu")), []
    for step, (images, labels) in enumerate(views(300), start=1):
        probe.update(step, backbone(images).detach(), labels)
        if step % 100 == 0:
            reports.append(probe.accuracies())
    assert len(reports) == 3
    assert reports[-1]["online_linear"] > 0.9 and reports[-1]["online_knn"] > 0.9
    assert reports[0]["online_linear"] < reports[-1]["online_linear"]
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.parameters(), strict=True))
    assert all(p.grad is None for p in backbone.parameters())


def test_a_batch_is_evaluated_before_it_is_learnt_from():
    probe = OnlineProbe(8, 2, torch.device("cpu"))
    probe.update(10, torch.randn(64, 8), torch.ones(64, dtype=torch.int64))
    assert probe.accuracies() == {
        "online_linear": 0.0
    }  # a head of zeros says class 0; no queue yet


def test_accuracies_are_those_since_the_last_report():
    probe, labels = OnlineProbe(8, 2, torch.device("cpu")), torch.arange(64) % 2
    features = F.one_hot(labels, 8).float()
    for step in range(1, 400):
        probe.update(step, features, labels)
    assert probe.accuracies()["online_linear"] < 1.0  # of the whole course
    probe.update(400, features, labels)
    assert probe.accuracies() == {"online_linear": 1.0, "online_knn": 1.0}
