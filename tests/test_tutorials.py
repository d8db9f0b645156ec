import re
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parent.parent / "docs" / "tutorials"
NUMBER = r"\d+(?:\.\d+)?"


def printed(notebook):
    return "".join(
        output.text if output.output_type == "stream" else f"picture {'image/png' in output.data} "
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spikingjelly", "snntorch"])
def test_a_tutorial_runs_and_prints_what_the_site_shows(name):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    shown = printed(notebook)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    got = printed(notebook)
    assert re.sub(NUMBER, "0", got).split() == re.sub(NUMBER, "0", shown).split()
    assert list(map(float, re.findall(NUMBER, got))) == pytest.approx(
        list(map(float, re.findall(NUMBER, shown))), rel=0.05, abs=0.1
    )
