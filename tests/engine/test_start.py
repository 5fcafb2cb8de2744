"""Every engine begins with the weights of another run, also where each rank holds a part."""

import os
from pathlib import Path

import engine_runs as runs
import torch
from ranks import run_on_ranks
from safetensors.torch import save_file

from scale_smog import distributed
from scale_smog.checkpoint.start_from import Start, fitting, read_start
from scale_smog.errors import UserError

PARTS = ("backbone", "heads", "momentum", "groups")
KINDS = ("ddp", "zero1", "zero3", "fsdp")


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


def errors_by_engine(folder: Path) -> dict[str, dict[str, float]]:
    return {kind: errors_after_start(kind, folder) for kind in KINDS}


def test_nets_of_another_run_are_put_into_every_engine(tmp_path):
    for by_engine in run_on_ranks(2, errors_by_engine, tmp_path):
        for kind, errors in by_engine.items():
            assert max(errors.values()) < 1e-5, kind


def sha256_of_start(folder: Path) -> tuple[str, str]:
    """Of a file that rank 0 alone can see, and what is said of one that nobody can."""
    os.chdir(folder / str(distributed.rank()))
    try:
        read_start("none.safetensors")
    except UserError as error:
        return read_start("net.safetensors").sha256, str(error)
    return "", ""


def test_one_rank_reads_what_all_begin_with(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    save_file({"layer1.weight": torch.randn(3, 2)}, tmp_path / "0" / "net.safetensors")
    (first, said), second = run_on_ranks(2, sha256_of_start, tmp_path)
    assert len(first) == 64 and "no such file" in said
    assert second == (first, said)


def has_compiled_an_op(folder: Path) -> bool:
    runs.build_state(runs.recipe_of(folder / "zero", kind="zero1"))
    return hasattr(torch.ops.deepspeed, "inference_all_reduce_")


def test_deepspeed_compiles_nothing_on_cpus(tmp_path, monkeypatch):
    """What it would compile keeps 66 MiB a rank in /dev/shm after the run."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert run_on_ranks(2, has_compiled_an_op, tmp_path) == [False, False]
    assert not (tmp_path / "extensions").exists()
