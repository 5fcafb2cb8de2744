"""Two hosts for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
from images import make_dataset


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
    """A set for the demo's recipe."""
    return make_dataset(tmp_path_factory.mktemp("demo"), num_images=320, num_classes=10)
