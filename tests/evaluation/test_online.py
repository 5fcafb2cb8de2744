"""The kNN and the linear classifier on the views in training."""

import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from small_recipe import small_recipe
from torch import nn

from scale_smog import distributed
from scale_smog.engine.base import Engine
from scale_smog.evaluation.online import OnlineProbe
from scale_smog.pretrain import pretrain


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


def accuracies_of(scale: float) -> dict[str, float]:
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    probe = OnlineProbe(8, 4, torch.device("cpu"))
    for step in range(1, 61):
        noise = torch.randn(64, 8)
        probe.update(step, scale * (F.one_hot(labels, 8).float() + noise), labels)
    return probe.accuracies()


def test_the_size_of_the_features_does_not_matter():
    assert accuracies_of(1000.0) == accuracies_of(1.0) == accuracies_of(0.1)


def two_halves() -> list[float]:
    """Every rank has one class only, so alone it would say that class of everything."""
    rank = distributed.rank()
    probe = OnlineProbe(8, 2, torch.device("cpu"))
    labels = torch.full((64,), rank)
    for step in range(1, 201):
        probe.update(step, F.one_hot(labels, 8).float(), labels)
    probe.accuracies()
    probe.update(201, F.one_hot(labels, 8).float(), labels)
    own = probe.accuracies()["online_linear"]
    probe.update(202, F.one_hot(1 - labels, 8).float(), 1 - labels)
    return [own, probe.accuracies()["online_linear"]]


def test_ranks_learn_one_classifier_from_all_images():
    assert run_on_ranks(2, two_halves) == [[1.0, 1.0]] * 2


def test_a_step_that_is_left_out_teaches_the_classifier_nothing(tmp_path, tars, monkeypatch):
    seen, step = [], Engine.step

    def step_but_the_third(engine, *rates):
        step(engine, *rates)
        seen.append(None)
        return len(seen) != 3

    monkeypatch.setattr(Engine, "step", step_but_the_third)
    monkeypatch.setattr(OnlineProbe, "update", lambda probe, step, *_: taught.append(step))
    taught = []
    pretrain(small_recipe(tmp_path, tars, "run.steps=5", "evaluation.online=true"))
    assert taught == [1, 2, 4, 5]
