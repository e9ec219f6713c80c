"""The tutorial notebook runs from top to bottom on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra dev)")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra dev)")


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.timeout(1500)
def test_the_tutorial_runs(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    assert "of 12 harmful requests are refused" in said and "projection restored" in said
    assert "Error" not in said
