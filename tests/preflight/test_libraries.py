"""Libraries that DALI's operators would miss only in the middle of a run are missed before it."""

import pytest
import torch

from scale_smog.config import DataConfig
from scale_smog.preflight import libraries

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_a_library_that_does_not_open_is_named_with_its_wheel():
    needed = {"libnone-of-this-name.so.7": "nvidia-none", "libc.so.6": "glibc"}
    (line,) = libraries.missing_libraries(needed)
    assert line.startswith("libnone-of-this-name.so.7 does not open (")
    assert line.endswith("): pip install nvidia-none")


def test_a_library_of_a_wheel_is_found_in_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "nvidia" / "npp" / "lib"
    folder.mkdir(parents=True)
    (folder / "libbroken.so.1").write_text("no library")
    monkeypatch.setattr(libraries.sysconfig, "get_path", lambda _: str(tmp_path))
    (line,) = libraries.missing_libraries({"libbroken.so.1": "nvidia-broken"})
    assert "libbroken.so.1 does not open" in line


@pytest.mark.parametrize("package", sorted(libraries.DALI_LIBRARIES))
def test_only_dali_on_a_gpu_needs_them_whichever_package_is_there(package, monkeypatch):
    monkeypatch.setattr(libraries, "installed_dali", lambda: package)
    needed = libraries.needed_libraries(DataConfig(path="", loader="dali"), GPU)
    assert any("npp" in name for name in needed) and any("cufft" in name for name in needed)
    for data, device in (
        (DataConfig(path="", loader="dali"), CPU),
        (DataConfig(path="", loader="dali", device="cpu"), GPU),
        (DataConfig(path="", loader="torch"), GPU),
    ):
        assert not libraries.needed_libraries(data, device)
