"""What all ranks are given of one another."""

import torch
from ranks import run_on_ranks

from scale_smog import distributed
from scale_smog.distributed import collectives


def gathered_in_pieces() -> torch.Tensor:
    collectives.GATHERED_AT_ONCE = 200  # bytes: four of seven rows
    return distributed.gather_columns(torch.full((7, 2, 2), float(distributed.rank())))


def test_columns_of_all_ranks_are_joined_in_rank_order_piece_by_piece():
    expected = torch.arange(3.0).repeat_interleave(2)[None, :, None].expand(7, 6, 2)
    for found in run_on_ranks(3, gathered_in_pieces):
        assert torch.equal(found, expected)
