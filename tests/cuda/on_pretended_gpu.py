"""Runs a program of one rank on the pretended runtime: `on_pretended_gpu.py PROGRAM [ARGUMENT]`.

It starts itself again with the runtime in place. Values mean nothing; that nothing fails does.
"""

import os
import runpy
import sys
from pathlib import Path
from unittest import mock

from scale_smog.profiling.hardware import load_hardware
from scale_smog.rehearsal.runtime_build import environment


def main() -> None:
    if "PRETENDED_GPUS" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], environment(load_hardware("h100")))
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from scale_smog.rehearsal.operations import Operations

    torch.backends.cudnn.enabled = False
    init = dist.init_process_group

    def alone(*_: object, **__: object) -> None:
        init("fake", rank=0, world_size=1, store=FakeStore())

    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    features_are_sound = mock.patch("scale_smog.grouping.kmeans._check_rows")
    with Operations(), features_are_sound, mock.patch.object(dist, "init_process_group", alone):
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
