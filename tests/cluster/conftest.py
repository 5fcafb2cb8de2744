"""Two hosts for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest

from scale_smog.data.manifest import MANIFEST_NAME
from scale_smog.data.prepare import demo as demo_images


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that ask for hosts are marked."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.hosts)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Cluster]:
    """Two hosts with sshd, or a reason why not."""
    if reason := hosts.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    with hosts.two_hosts(folder) as both:
        yield hosts.Cluster(folder, both)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tars, with fewer images."""
    folder = tmp_path_factory.mktemp("demo") / "demo_data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_images, "NUM_IMAGES", {"train": 320, "test": 40})
        patch.setattr(demo_images, "_SHARD_SAMPLES", 80)
        demo_images.make_demo(folder)
    assert (folder / MANIFEST_NAME).exists()
    return folder
