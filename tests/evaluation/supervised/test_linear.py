"""The linear classifier."""

import torch
import torch.nn.functional as F
from ranks import run_on_ranks

from scale_smog.evaluation.accuracy import topk_correct
from scale_smog.evaluation.protocols import LinearConfig
from scale_smog.evaluation.supervised.linear import build_heads
from scale_smog.evaluation.supervised.logistic import fit_logistic


def features(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-negative features [num, 24] of different sizes, as behind a ReLU, and classes [num]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 24, generator=torch.Generator().manual_seed(9))
    classes = torch.randint(5, (num,), generator=generator)
    z = centres[classes] + 1.5 * torch.randn(num, 24, generator=generator)
    return z.relu() * torch.logspace(-2, 0, 24), classes


def test_the_minimum_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    (z, y), (test_z, test_y) = features(2000, 0), features(1000, 1)
    oracle = LogisticRegression(C=0.5, max_iter=5000, tol=1e-8)
    oracle.fit(z.double().numpy(), y.numpy())
    weight, bias = fit_logistic(z, y, 5, inverse_penalty=0.5)
    predicted = F.linear(test_z.double(), weight, bias).argmax(1)
    expected = torch.from_numpy(oracle.predict(test_z.double().numpy()))
    assert (predicted == expected).double().mean() >= 0.999
    own = (predicted == test_y).double().mean()
    assert abs(own - (expected == test_y).double().mean()) <= 0.003 and own < 0.98
    coefficients = torch.from_numpy(oracle.coef_)
    centred = weight - weight.mean(0)  # softmax leaves a common part open
    assert torch.allclose(centred, coefficients - coefficients.mean(0), atol=1e-3)


def fitted() -> torch.Tensor:
    z, y = features(301, 0)
    return fit_logistic(z, y, 5, inverse_penalty=1.0)[0]


def test_two_ranks_find_the_same_minimum_as_one():
    one, two = fitted(), run_on_ranks(2, fitted)
    assert torch.equal(two[0], two[1]) and torch.allclose(one, two[0], atol=1e-4)


def test_heads_side_by_side_train_as_each_alone():
    z, y = features(64, 0)
    config = LinearConfig(learning_rates=(0.1, 1.0, 7.0), batch=64, weight_decay=1e-2)

    def trained(rates: tuple[float, ...]) -> list[torch.Tensor]:
        own = config.model_copy(update={"learning_rates": rates})
        heads, optimizer = build_heads(own, 24, 5, torch.device("cpu"))
        for _ in range(20):
            logits = heads(z)  # [64, L, 5]
            labels = y[:, None].expand(logits.shape[:2])
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            (loss * len(rates)).backward()
            optimizer.step()
        return [weight.detach() for weight in heads.weights]

    together = trained((0.1, 1.0, 7.0))
    for rate, weight in zip((0.1, 1.0, 7.0), together, strict=True):
        assert torch.allclose(weight, trained((rate,))[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_correct_predictions_are_counted_for_each_classifier():
    logits = torch.tensor([[[9.0, 1, 2, 3, 4, 5], [0.0, 1, 2, 3, 4, 5]]])  # [1, 2, 6]
    assert topk_correct(logits, torch.tensor([0])).tolist() == [[1, 1], [0, 0]]
    assert topk_correct(logits, torch.tensor([1])).tolist() == [[0, 0], [0, 1]]


def test_a_learning_rate_is_for_256_images():
    config = LinearConfig(learning_rates=(0.1, 3.0), batch=1024)
    _, optimizer = build_heads(config, 8, 2, torch.device("cpu"))
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 12.0]
