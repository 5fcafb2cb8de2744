"""Image folders as sources."""

from pathlib import Path

from scale_smog.data.image_folder import FolderReader, list_folder
from scale_smog.data.prepare.sources.source import Source


def folder_source(folder: str | Path) -> Source:
    """The images of a folder; kinds of folders and errors are those of `list_folder`."""
    classes, images = list_folder(folder)
    return Source(classes, images, FolderReader(Path(folder)))
