"""What several tests share."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from images import make_dataset
from pictures import PICTURES
from ports import free_port

# Ranks and loaders of a test must not fight over the cores with many threads each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Of some two hundred processes the first compiles the package for all.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Files of minutes begin first: one that begins last keeps a single process busy at the end.
LONGEST = (
    "test_engines_agree.py",
    "test_faults.py",
    "test_demo.py",
    "test_agreement.py",
    "test_launchers.py",
    "test_timm_inputs.py",
    "test_programs.py",
    "test_wide_nets.py",
    "test_checkpoint.py",
    "test_elastic.py",
    "test_resume.py",
    "test_hub.py",
    "test_check.py",
    "test_evaluate.py",
    "test_notebook.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests by their file, the longest first."""
    items.sort(key=lambda x: LONGEST.index(x.path.name) if x.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def indexes_of_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is known of image folders is kept there, and not in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALE_SMOG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def processes_that_have_imported_torch(indexes_of_folders: None) -> None:
    """Before a test starts a process: the first start decides what all later ones have imported."""
    if "ranks" in sys.modules:  # else no test here starts ranks
        sys.modules["ranks"].start_forkserver()


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Runs in this process draw none; who looks at them takes `pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        if "scale_smog.pretrain" in sys.modules:  # else no test here trains a run
            for name in PICTURES:
                patch.setattr(name, lambda *_: None)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures that a run ends with."""
    from scale_smog.evaluation.groups.pictures import draw_groups
    from scale_smog.reporting.curves import draw_run_curves

    for name, draw in zip(PICTURES, (draw_groups, draw_run_curves), strict=True):
        monkeypatch.setattr(name, draw)


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty training and twenty test images of about 40 px in four classes, as tar shards."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a reader may still be there


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of an S3 server on this machine, with an empty bucket."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    from s3_store import s3_server

    with s3_server() as port:
        yield port


@pytest.fixture
def s3(s3_port, tmp_path, monkeypatch):
    """A proxy before the S3 server, which the environment names as Amazon's libraries expect."""
    import s3_store
    from s3fs import S3FileSystem

    from scale_smog.data.remote.space import use_cache

    S3FileSystem.clear_instance_cache()  # the last test's had another address
    with s3_store.proxy_of(s3_port, free_port()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDOFTHISTEST")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-this-test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        use_cache(str(tmp_path / "cache"), 1.0)
        yield proxy
        use_cache("", 100.0)
