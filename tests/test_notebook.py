"""The notebook runs from its first cell to its last, and shows what it says it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "mnist_net.ipynb"


def test_notebook(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(notebook.cells) == 10
    # What is committed has been run by nobody: no outputs to go stale.
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code)

    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = "".join(
        output.text for cell in code for output in cell.outputs if output.output_type == "stream"
    )
    accuracies = [float(number) for number in re.findall(r"([\d.]+)% after 5 epochs", said)]
    assert len(accuracies) == 3
    assert min(accuracies) > 85
    assert "1 of 2" in said or "linear_relu" in said
    (difference,) = re.findall(r"difference of a parameter after training: (\S+)", said)
    assert float(difference) < 1e-3
    pictures = [
        output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2  # the curves, of which the last ones stay, and the digits
    assert (tmp_path / "runs" / "notebook" / "checkpoint.pt").exists()
