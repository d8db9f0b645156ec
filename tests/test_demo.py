import csv
import io
import re
import sys

import pytest
import rich.console
import torch

from sltt_ext.cli import main
from sltt_ext.data import load_digits
from sltt_ext.demo import METHODS, DemoSettings, run_demo
from sltt_ext.errors import MissingDependencyError
from sltt_ext.optional import require, require_all


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    settings = DemoSettings(epochs=2, channels=8, memory_time_steps=(1, 32))
    return run_demo(settings, output), output


def test_every_method_learns(finished):
    results, _ = finished
    assert list(results) == list(METHODS)
    assert all(result.accuracy[-1] > 0.5 for result in results.values())


def test_memory_of_sltt_does_not_grow(finished):
    results, _ = finished
    assert results["BPTT"].peak_bytes[32] > 10 * results["BPTT"].peak_bytes[1]
    for method in ("SLTT", "SLTT-2", "SLTT-1"):
        peaks = results[method].peak_bytes
        assert peaks[32] <= 1.05 * peaks[1] <= 1.05 * results["BPTT"].peak_bytes[1]


def test_files(finished):
    _, output = finished
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    with (output / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(METHODS)
    assert float(rows[0]["time_ratio"]) == float(rows[0]["memory_ratio"]) == 1.0
    assert (output / "epochs.csv").read_text().count("\n") == 1 + 2 * len(METHODS)
    assert (output / "memory.csv").read_text().count("\n") == 1 + 3 * len(METHODS)


def test_digits_are_the_same_every_time():
    first, second = load_digits(), load_digits()
    assert first.train_images.shape == (1297, 1, 8, 8)
    assert first.test_images.shape == (500, 1, 8, 8)
    assert 0 <= first.train_images.min() < first.train_images.max() == 1
    assert torch.equal(first.test_labels, second.test_labels)
    assert set(first.test_labels.tolist()) == set(range(10))


def test_what_is_said(tmp_path):
    """In a file: first how long it will take, lines on the way, and in the end the picture and what it means."""
    console = rich.console.Console(file=io.StringIO(), width=100)
    run_demo(DemoSettings(epochs=1, channels=4, memory_time_steps=(1,)), tmp_path, console)
    said = console.file.getvalue()
    words = " ".join(said.split())
    assert re.search(r"This takes about \d+ (seconds|minutes?) here", words)
    assert re.search(r"1/4 after \d+ s: BPTT, epoch 1: test accuracy", words)
    assert re.search(r"At T = 6, SLTT took \d+% of BPTT's memory and \d+% of its time, and classified", words)
    assert f"The picture: {tmp_path / 'demo.png'}" in said.splitlines()
    assert (
        said.index("This takes") < said.index("1/4 after") < said.index("The picture") < said.index("Left, ")
    )


def test_a_quick_one_is_smaller(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("sltt_ext.demo.run_demo", lambda settings, output: asked.append(settings))
    assert main(["demo", "--quick", "--time-steps", "3", "--output", str(tmp_path)]) == 0
    assert main(["demo", "--time-steps", "3", "--output", str(tmp_path)]) == 0
    quick, usual = asked
    assert (quick.epochs, quick.channels, quick.time_steps) == (2, 16, 3)
    assert (usual.epochs, usual.channels, usual.time_steps) == (10, 32, 3)


def test_all_missing_packages_are_named_at_once(monkeypatch):
    for name in ("sklearn", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingDependencyError, match=r"^sklearn and rich are not installed: pip install 'sltt-ext\[demo\]'$"
    ):
        require_all(("spikingjelly", "sklearn", "rich"), extra="demo")
    require_all(("spikingjelly",), extra="demo")


def test_missing_package_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sltt-ext\[demo\]'"):
        require("sklearn", extra="demo")
    assert main(["demo", "--output", str(tmp_path / "out")]) == 1
    assert "sltt-ext[demo]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["demo", "--epochs", "0"], ["train"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: sltt" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("sltt-ext ")
