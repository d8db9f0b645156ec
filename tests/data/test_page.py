"""What docs/data.md says."""

import re
from pathlib import Path

import alive
import pytest

pytest.importorskip("lightning")
pytest.importorskip("sklearn")
from sltt_ext.data import DATA_SETS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()


def test_every_set_is_in_the_table():
    assert re.findall(r"^\| `(\w+)` `(\w+)` \|", PAGE, re.MULTILINE) == [
        (name, module.__name__) for name, module in DATA_SETS.items()
    ]


def test_default_folders():
    for name, module in DATA_SETS.items():
        embedded = name in ("digits", "event_digits")
        assert module.default_root == (None if embedded else f"data/{name}")


def test_examples_run_as_printed_and_their_networks_learn(monkeypatch):
    pytest.importorskip("spikingjelly")
    seen = alive.Seen(monkeypatch)
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(example, {})
    monkeypatch.undo()
    assert seen.networks
    for net, iteration in seen.networks.items():
        alive.check(net, iteration)


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    script = ROOT / "docs" / "figures" / "event_camera.py"
    names = {"__name__": "script", "__file__": str(tmp_path / script.name)}
    exec(script.read_text(), names)
    names["main"]()
    assert (tmp_path / "event_camera.png").stat().st_size > 1000
