"""The judge of the views in training."""

import torch
import torch.nn.functional as F
from torch import nn

from scale_smog.data.batch import Batch
from scale_smog.evaluation.online import OnlineProbe


def batches(num: int):
    """Two large views [48, 3, 4, 4] each; the class is the brightest colour."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(num):
        label = torch.randint(3, (48,), generator=generator)
        bright = F.one_hot(label, 3).float()[:, :, None, None]
        views = [bright + 0.3 * torch.randn(48, 3, 4, 4, generator=generator) for _ in range(2)]
        yield Batch(views, [], label, torch.arange(48))


def test_it_learns_from_the_passes_of_the_training_and_from_no_others():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 16))
    before = [p.clone() for p in backbone.parameters()]
    reports: dict[int, dict[str, float]] = {}
    probe = OnlineProbe(backbone, 16, 3, torch.device("cpu"))
    watched = probe.watching(batches(300), 100, 100, lambda step, x: reports.update({step: x}))
    backbone(torch.zeros(48, 3, 4, 4))  # not a step: must not count
    for number, batch in enumerate(watched):
        backbone(batch.large[0])
        backbone(batch.large[1][:7])  # a small view, of another size
        if number % 50 == 0:
            backbone(torch.zeros(5, 3, 4, 4))  # an evaluation between two steps
    assert list(reports) == [200, 300, 400]
    assert reports[400]["online_linear"] > 0.9 and reports[400]["online_knn"] > 0.9
    assert reports[200]["online_linear"] < reports[400]["online_linear"]
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.parameters(), strict=True))
    assert all(p.grad is None for p in backbone.parameters())
