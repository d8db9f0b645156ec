import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

from sltt_ext.cli import main
from sltt_ext.cli.arguments import check_writable

MODELS = """
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

def build(outputs=5):
    return nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1), layer.BatchNorm2d(4), neuron.LIFNode(), layer.MaxPool2d(2), layer.Flatten(),
        layer.Linear(64, 8), neuron.LIFNode(), layer.Linear(8, outputs))

def maps():
    return nn.Sequential(layer.Conv2d(1, 4, 3), neuron.LIFNode())

def with_depth(depth, width=3):
    return build()

def raises():
    raise RuntimeError("no weights found")

def returns_text():
    return "a network"

class _Spoiled(nn.Module):  # changes in place what its backward needs, but runs without gradients
    def forward(self, x):
        return x.exp().mul_(2)

class _Greedy(nn.Module):
    def forward(self, x):
        return x + torch.empty(10**15, len(x), 1).sum(0)

def out_of_memory():
    return nn.Sequential(layer.Flatten(), _Greedy(), neuron.LIFNode(), layer.Linear(64, 5))

def spoiled_backward():
    return nn.Sequential(layer.Flatten(), layer.Linear(64, 5), _Spoiled(), neuron.LIFNode(), layer.Linear(5, 5))

def no_neurons():
    return nn.Linear(2, 2)

ready = build()
number = 3
"""
SMALL = ["--input-shape", "1,8,8", "--time-steps", "3", "--batch", "6", "--device", "cpu"]
VOID = {"meta", "link", "br", "use", "path"}


class Page(HTMLParser):
    """What a page holds, and what it asks for beyond itself."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.identifiers, self.references, self.outside, self.open, self.text = (
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.identifiers.append(value)
            elif name in ("src", "href", "xlink:href", "data", "srcset"):
                (self.references if value.startswith("#") else self.outside).append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


@pytest.fixture(autouse=True)
def _models(tmp_path, monkeypatch):
    (tmp_path / "user_models.py").write_text(MODELS)
    (tmp_path / "broken_models.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "failing_models.py").write_text("raise ValueError('half written')\n")
    (tmp_path / "exiting_models.py").write_text("import sys\nsys.exit('usage: train')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("user_models", "broken_models", "failing_models", "exiting_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def report(tmp_path, capsys):
    assert main(["analyze", "user_models:build", *SMALL, "--output", "out"]) == 0
    return (tmp_path / "out" / "report.html").read_text(), capsys.readouterr().out


def test_the_page_needs_nothing_else(report):
    html, _ = report
    page = Page(html)
    assert page.open == []
    assert page.outside == ["data:,"]
    assert "script" not in page.tags
    assert "@import" not in html
    assert "url(http" not in html
    assert len(page.identifiers) == len(set(page.identifiers))
    assert set(page.references) <= {f"#{identifier}" for identifier in page.identifiers}


def test_the_page_has_every_part(report):
    html, printed = report
    page = Page(html)
    assert page.tags.count("svg") == 9
    answer = r"SLTT keeps (0\.\d+|1) of the gradient's direction,? (only, )?at \d+% of BPTT's memory and \d+% of its time\."
    assert re.search(answer, " ".join(page.text))
    assert re.match(answer, " ".join(printed[printed.index("SLTT keeps") :].split()))
    for heading in (
        "Will it hurt? The gradient against BPTT's",
        "What does it save? Memory",
        "What runs? Operations and spikes",
    ):
        assert heading in page.text
    for layer in ("0", "1", "2", "5", "6", "7", "5.weight"):
        assert layer in page.text
    assert "random numbers" in html
    assert "random numbers" in " ".join(printed.split())
    advice = r"Windows of \d of the 3 time steps.* keep [01]\.\d{4} of the direction of BPTT's gradient at \d\.\d\d of"
    assert re.search(advice, " ".join(page.text))
    assert 'name="viewport"' in html
    assert "prefers-color-scheme" in html or "light-dark(" in html


def test_json_has_the_numbers_of_the_tools(tmp_path, capsys):
    assert main(["analyze", "user_models:build", *SMALL, "--output", "out", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "report.json").read_text())
    overall = printed["gradient_similarity"]["rows"][0]
    assert overall["level"] == "network"
    assert 0 < overall["cosine"] <= 1
    windows = {row["window"]: row for row in printed["temporal_credit"]["rows"] if row["level"] == "network"}
    assert windows.keys() == {1, 2, 3}
    assert windows[3]["cosine"] == pytest.approx(1)
    assert [counts["method"] for counts in printed["operations"]] == ["BPTT", "SLTT", "SLTT-1"]
    assert {row["time_steps"] for row in printed["memory"]["rows"]} == {1, 2, 3}
    assert len(printed["drawn_steps"]["cosines"]) == 3
    assert [row["method"] for row in printed["timing"]["rows"]][:2] == ["BPTT", "SLTT"]
    assert [row["layer"] for row in printed["activity"]["rows"]] == ["2", "6"]


def test_real_data(tmp_path, capsys):
    torch.save((torch.rand(3, 14, 1, 8, 8), torch.randint(5, (14,))), tmp_path / "data.pt")
    arguments = ["--data", "data.pt", "--time-dim", "0", "--batches", "9", *SMALL[2:], "--json"]
    assert main(["analyze", "user_models:build", *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["gradient_similarity"]["batches"] == 2
    assert printed["notes"] == []


@pytest.mark.parametrize(
    ("limit", "note", "samples"),
    [
        ("60KB", "every batch was cut to ", None),
        ("1KB", "the gradient similarity and the temporal credit are left out", 1),
    ],
)
def test_bptt_that_does_not_fit(limit, note, samples, capsys):
    arguments = ["user_models:build", *SMALL, "--batch", "16", "--bptt-max-memory", limit]
    assert main(["analyze", *arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert any(note in text for text in printed["notes"])
    for part in ("gradient_similarity", "temporal_credit"):
        assert (printed[part] is None) == (samples == 1)
    bptt = [row["peak_bytes"] for row in printed["memory"]["rows"] if row["method"] == "BPTT"]
    if samples is None:
        assert max(bptt) <= 60_000
    assert printed["activity"]["samples"] < 16
    assert (samples == 1) == printed["memory"]["fake"]
    assert main(["analyze", *arguments]) == 0  # the page, too


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:build"], "there is no module 'nowhere'"),
        (["user_models.inner:build"], "importing user_models.inner raised|there is no module 'user_models.inner'"),
        (["user_models.py:build"], "is a file: name the module, user_models"),
        (["broken_models:build"], "importing broken_models raised ModuleNotFoundError: .*a_package_that"),
        (["failing_models:build"], "importing failing_models raised ValueError: half written; --debug"),
        (["user_models:bild"], "user_models has no 'bild': it has build, maps"),
        (["user_models:number"], "is a int, not a function"),
        (["user_models:ready"], "is a network: name a function"),
        (["user_models:with_depth"], r"needs arguments: depth. .* return with_depth\(depth=...\)"),
        (["user_models:raises"], "raised RuntimeError: no weights found; --debug"),
        (["user_models:returns_text"], "returned a str, not a torch.nn.Module"),
        (["user_models:no_neurons", "--input-shape", "2"], "no spiking neuron"),
        (["user_models:build", "--input-shape", "3,8,8"], r"a time step failed \(RuntimeError: .*channels"),
        (["user_models:maps"], "cross-entropy needs"),
        (["user_models:build", "--classes", "6"], "--classes 6: the network has 5 outputs"),
        (["user_models:build", "--device", "nowhere"], "--device nowhere: "),
        (["user_models:build", "--data", "missing.pt"], "there is no file missing.pt"),
        (["user_models:build", "--data", "user_models.py"], "cannot be loaded"),
        (["user_models:build", "--data", "tensor.pt"], "must have a pair of tensors"),
        (["user_models:build", "--data", "uneven.pt"], "disagree on the number of samples"),
        (["user_models:build", "--data", "wrong_label.pt"], r"Target 9 is out of bounds.*classes from 0 to 4"),
        (["user_models:build", "--data", "float_label.pt"], "cross-entropy cannot take the target"),
        (["user_models:build", "--data", "sequence.pt"], "say time_dim=1"),
        (["user_models:build", "--data", "half.pt"], r"rejects an input of shape \[6, 1, 8, 8\]"),
        (["user_models:build", "--time-dim", "0"], "give --data FILE.pt, or leave it out"),
        (["user_models:build", "--device", "meta"], "--device meta: sltt runs on cpu and cuda devices"),
        (["user_models:build", "--batch", "900000000", "--input-shape", "900000000,99,99"], "smaller --batch"),
        (["user_models:out_of_memory"], "out of memory: use a smaller --batch"),
        (["user_models:spoiled_backward"], "RuntimeError: .*inplace operation.*; --debug shows where"),
        (["exiting_models:build"], "importing exiting_models raised SystemExit: usage: train; --debug"),
    ],
)  # fmt: skip
def test_mistakes_are_told_without_traceback(arguments, message, capsys):
    torch.save(torch.ones(3), "tensor.pt")
    torch.save((torch.ones(3, 1, 8, 8), torch.zeros(4)), "uneven.pt")
    torch.save((torch.ones(6, 1, 8, 8), torch.tensor([0, 0, 0, 0, 0, 9])), "wrong_label.pt")
    torch.save((torch.ones(6, 1, 8, 8), torch.zeros(6)), "float_label.pt")
    torch.save((torch.ones(6, 3, 1, 8, 8), torch.zeros(6, dtype=torch.long)), "sequence.pt")
    torch.save((torch.ones(6, 1, 8, 8).half(), torch.zeros(6, dtype=torch.long)), "half.pt")
    code = main(["analyze", *SMALL, *arguments, "--output", "out"])
    assert code == (2 if set(arguments) & {"--device", "--time-dim"} else 1)
    said = capsys.readouterr().err
    assert said.startswith("sltt: ")
    assert said.count("\n") == 1 or "nothing was converted" in said
    assert "Traceback" not in said
    assert re.search(message, said), said


@pytest.fixture
def no_work(monkeypatch):
    """Fails where the work begins."""

    def begins(*arguments, **options):
        pytest.fail("the work began")

    monkeypatch.setattr("sltt_ext.cli.inputs.build", begins)
    monkeypatch.setattr("sltt_ext.demo.run.Training", begins)


@pytest.mark.parametrize("path", ["file", "file/deeper", "proc", "x" * 300])
@pytest.mark.parametrize(
    "command",
    [["analyze", "user_models:build", "--output"], ["demo", "--output"], ["bench", "--csv"]],
    ids=str,
)
@pytest.mark.usefixtures("no_work")
def test_what_cannot_be_written_is_told_before_the_work(command, path, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    where = {"file": "folder" if "--csv" in command else "file", "proc": "/proc/nothing/there"}.get(
        path, path
    )
    before = sorted(tmp_path.rglob("*"))
    assert main([*command, where]) == 2
    said = capsys.readouterr().err
    assert re.match(rf"sltt: {command[-1]}: .* cannot be written \(.*\): give another path\n$", said), said
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_checking_what_can_be_written_leaves_nothing_behind(tmp_path):
    old, linked = tmp_path / "old.csv", tmp_path / "link.csv"
    old.write_text("rows")
    linked.symlink_to(tmp_path / "target.csv")
    before = sorted(tmp_path.rglob("*"))
    check_writable("--csv", old, tmp_path / "new" / "deeper" / "new.csv")
    assert sorted(tmp_path.rglob("*")) == before
    check_writable("--csv", linked)
    assert linked.is_symlink()
    assert old.read_text() == "rows"


@pytest.mark.parametrize("command", [["demo"], ["bench"], ["analyze", "user_models:build", *SMALL]], ids=str)
@pytest.mark.usefixtures("no_work")
def test_a_device_that_holds_no_numbers_is_told_before_the_work(command, capsys):
    assert main([*command, "--device", "meta"]) == 2
    assert "--device meta: sltt runs on cpu and cuda devices" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["env"], ["analyze", "--help"], ["--version"]], ids=str)
def test_output_that_nobody_reads_on_is_no_error(arguments):
    """As `sltt env | head` has it."""
    command = [sys.executable, "-c", f"from sltt_ext.cli import main; raise SystemExit(main({arguments}))"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode in (0, 1), done.stderr) == (True, "")


def test_debug_gives_the_traceback():
    with pytest.raises(Exception, match="no weights found") as raised:
        main(["analyze", "user_models:raises", *SMALL, "--debug"])
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_input_shape_or_data_is_needed(capsys):
    assert main(["analyze", "user_models:build"]) == 2
    assert "give --input-shape, such as 3,64,64, or --data FILE.pt" in capsys.readouterr().err
    assert main(["plan", "user_models:build"]) == 2
    assert capsys.readouterr().err == "sltt: give --input-shape, such as 3,64,64\n"


@pytest.mark.parametrize(
    "arguments",
    [["analyze"], ["analyze", "build"], ["analyze", "m:f", "--input-shape", "3;4"], ["analyze", "m:f", "--bptt-max-memory", "much"],
     ["analyze", "m:f", "--time-steps", "0"], ["bench", "--repeats", "0"], ["bench", "--repeats", "9" * 5000],
     ["analyze", "m:f", "--seed", "9" * 30], ["demo", "--seed", "first"], ["analyze", "m:f", "--bptt-max-memory", "9" * 400]],
)  # fmt: skip
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: sltt" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["analyze", "bench", "demo", "env"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"sltt {command} " in capsys.readouterr().out.partition("example")[2]


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sltt_ext.cli.inputs.network", interrupted)
    assert main(["analyze", "user_models:build", *SMALL]) == 130
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_out_of_memory(error, monkeypatch, capsys):
    def too_large(*arguments, **options):
        raise error

    monkeypatch.setattr("sltt_ext.analysis.analyze.analyze", too_large)
    assert main(["analyze", "user_models:build", *SMALL]) == 1
    assert "smaller --batch" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser is installed")
def test_a_browser_opens_the_page_without_complaint(report, tmp_path):
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'out' / 'report.html'}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<svg") == 9
