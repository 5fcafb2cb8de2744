"""The notebook of the first hour runs, on a CPU, from an empty folder."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "first_hour.ipynb"
STEPS, FEW_STEPS = '"run.steps=60"', '"run.steps=6"'  # what follows asks for no good net


def test_the_notebook_of_the_first_hour_runs(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (trains,) = [cell for cell in notebook.cells if STEPS in cell.source]
    trains.source = trains.source.replace(STEPS, FEW_STEPS)
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1800, startup_timeout=600, resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs)
    assert "split train: 640 images in a folder" in said and "kNN top-1, trained net" in said
    assert (tmp_path / "backbone" / "model.safetensors").exists()
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
