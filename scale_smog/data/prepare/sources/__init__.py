"""What sharding reads: image folders, CSV lists, parquet files, existing tars."""

from glob import glob
from pathlib import Path

from scale_smog.data.prepare.sources.csv_list import csv_source
from scale_smog.data.prepare.sources.folder import folder_source
from scale_smog.data.prepare.sources.parquet import parquet_source
from scale_smog.data.prepare.sources.source import Source
from scale_smog.data.prepare.sources.tar import tar_source
from scale_smog.errors import UserError

__all__ = ["Source", "open_source"]


def open_source(source: str | Path) -> Source:
    """Finds out what kind of source it is: tars, parquet or CSV by its ending, else a folder.

    `source` may be a pattern such as `images/train-*.tar`.

    Raises:
        UserError: there is nothing of that name, or the source itself is at fault.
    """
    kinds = {".tar": tar_source, ".parquet": parquet_source, ".csv": csv_source}
    make = kinds.get(Path(source).suffix.lower())
    if make is None or Path(source).is_dir():
        return folder_source(source)
    paths = [Path(name) for name in sorted(glob(str(source)))]
    if not paths and not Path(source).exists():
        raise UserError(f"no file {source}")
    return make(paths or [Path(source)])
