"""Every engine begins with the weights of another run, also where each rank holds a part."""

from pathlib import Path

import engine_runs as runs
import pytest
import torch
from ranks import run_on_ranks

from scale_smog.checkpoint.start_from import Start, fitting

PARTS = ("backbone", "heads", "momentum", "groups")


def errors_after_start(kind: str, folder: Path) -> dict[str, float]:
    """Largest difference of each net's features from those of the weights it was given."""
    state = runs.build_state(runs.recipe_of(folder / kind, kind=kind))
    (view, _), _ = runs.global_batch(100)
    given, expected = {}, {}
    for seed, (name, plain) in enumerate(
        zip(("online", "momentum"), runs.build_tiny_nets(0), strict=True)
    ):
        torch.manual_seed(10 + seed)
        for value in plain.parameters():
            value.data.normal_(std=0.3)
        given |= {f"{name}.{key}": value for key, value in plain.state_dict().items()}
        with torch.no_grad():
            expected[name] = plain.eval().features(view.float())
    own = state.state_dict()
    values, lines = fitting(Start(given, None), own, PARTS, "there")
    state.load_state_dict({name: x.values for name, x in own.items()} | values, step=0)
    assert [line.partition(":")[0] for line in lines] == list(PARTS)
    return {
        name: (state.engine.embed(view, of=name) - value).abs().max().item()
        for name, value in expected.items()
    }


@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero3", "fsdp"])
def test_nets_of_another_run_are_put_into_every_engine(kind, tmp_path):
    for errors in run_on_ranks(2, errors_after_start, kind, tmp_path):
        assert max(errors.values()) < 1e-5
