import csv
import itertools
import json

import networks
import pytest
from torch.nn import functional as F

from sltt_ext.analysis.timing import benchmark, interleaved_medians
from sltt_ext.cli import main
from sltt_ext.errors import ConfigurationError

TINY = ["--input-shape", "3,16,16", "--batch", "2", "--time-steps", "3", "--repeats", "1", "--device", "cpu"]


def test_medians_of_runs_in_turns():
    calls, now = [], iter([0, 1, 0, 10, 0, 3, 0, 30, 0, 2, 0, 20])
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert interleaved_medians(runs, 3, clock=lambda: next(now)) == {"a": 2, "b": 20}
    assert "".join(calls) == "ab" * 4


def test_the_spread_of_the_repetitions(monkeypatch):
    """Every run takes as many seconds more than the one before: 1, 2, 3, ... of both methods in turns."""
    ticks = (now for start in itertools.count(1) for now in (0, start))
    monkeypatch.setattr("sltt_ext.analysis.timing.time.perf_counter", lambda: next(ticks))
    net = networks.conv_net()
    result = benchmark(net, *networks.images(), F.cross_entropy, 2, methods=("bptt", "sltt"), repeats=3)
    spread = [(row.fastest_seconds, row.seconds, row.slowest_seconds) for row in result.rows]
    assert spread == [(1, 3, 5), (2, 4, 6)]
    assert result.rows[1].relative_seconds == 4 / 3


def test_memory_and_time_relative_to_the_first():
    net = networks.conv_net()
    result = benchmark(net, *networks.images(), F.cross_entropy, 6, methods=("bptt", "sltt"), repeats=1)
    bptt, sltt = result.rows
    assert (bptt.relative_seconds, bptt.relative_bytes) == (1, 1)
    assert sltt.relative_bytes == sltt.peak_bytes / bptt.peak_bytes < 0.5
    assert all(parameter.grad is None for parameter in net.parameters())
    assert list(result.to_dataframe()["method"]) == ["BPTT", "SLTT"]


def test_built_in_network_as_table_json_and_csv(tmp_path, capsys):
    path = tmp_path / "bench.csv"
    assert main(["bench", *TINY, "--csv", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    methods = ["BPTT", "SLTT", "SLTT-2", "SLTT-1"]
    assert [row["method"] for row in printed["rows"]] == methods
    with path.open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == methods
    assert main(["bench", *TINY, "--methods", "bptt", "sltt-1"]) == 0
    printed = capsys.readouterr().out
    assert "SLTT-1" in printed
    assert "fastest" in printed


@pytest.mark.parametrize(
    ("methods", "message"), [(["bptt", "ottt"], "method must be"), (["sltt", "SLTT"], "a method twice")]
)
def test_mistakes(methods, message, capsys):
    assert main(["bench", *TINY, "--methods", *methods]) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_measure():
    with pytest.raises(ConfigurationError, match="at least one"):
        benchmark(networks.conv_net(), *networks.images(), F.cross_entropy, 6, methods=())
