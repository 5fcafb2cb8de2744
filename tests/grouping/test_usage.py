"""How the usage of the groups is judged."""

import torch

from scale_smog.grouping import GroupUsage, perplexity

CPU = torch.device("cpu")


def test_perplexity_counts_groups_that_are_used_alike():
    assert abs(perplexity(torch.tensor([5, 5, 5, 5])) - 4) < 1e-9
    assert abs(perplexity(torch.tensor([9, 0, 0, 0])) - 1) < 1e-9
    assert abs(perplexity(torch.tensor([7, 7, 0, 0])) - 2) < 1e-9


def test_usage_covers_exactly_the_window_and_survives_a_restart():
    usage = GroupUsage(3, CPU, num_steps=2)
    for counts in ([9, 0, 0], [1, 2, 0], [0, 0, 4]):
        usage.push(torch.tensor(counts))
    assert usage.counts().tolist() == [1, 2, 4]
    again = GroupUsage(3, CPU, num_steps=2)
    again.load_state_dict(
        {name: partition.values for name, partition in usage.state_dict().items()}
    )
    for state in (usage, again):
        state.push(torch.tensor([5, 0, 0]))
    assert usage.counts().tolist() == again.counts().tolist() == [5, 0, 4]
