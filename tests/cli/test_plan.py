import json

import networks
import pytest
from torch.nn import functional as F

from sltt_ext.analysis.plans import plans
from sltt_ext.cli import main
from sltt_ext.errors import ConfigurationError

TINY = [
    "plan",
    "networks:conv_net",
    "--input-shape",
    "1,8,8",
    "--batch",
    "2",
    "--time-steps",
    "2",
    "--device",
    "cpu",
]
SHORT = [*TINY, "--repeats", "1", "--methods", "bptt", "sltt"]


def test_every_plan_of_a_method_and_the_one_that_is_taken():
    net = networks.conv_net()
    told = []
    result = plans(
        net,
        *networks.images(),
        F.cross_entropy,
        2,
        methods=("bptt", "sltt"),
        repeats=1,
        on_progress=told.append,
    )
    bptt, *rows = result.rows
    assert (bptt.method, bptt.plan, bptt.is_taken) == ("BPTT", "all steps in memory", False)
    assert {row.method for row in rows} == {"SLTT"}
    assert sum(row.is_taken for row in rows) == 1
    assert len({row.plan for row in rows}) == len(rows) > 1
    assert all(row.relative_bytes == row.peak_bytes / bptt.peak_bytes for row in rows)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert any(what.startswith("SLTT tries") for what in told)


def test_the_leanest_is_one_row():
    _, *rows = plans(
        networks.conv_net(), *networks.images(), F.cross_entropy, 2, methods=("bptt", "sltt"), memory_budget="least", repeats=1
    ).rows  # fmt: skip
    assert [row.is_taken for row in rows] == [True]
    assert rows[0].plan.startswith("chunk 1 of 2")


def test_table(capsys):
    assert main(SHORT) == 0
    printed = capsys.readouterr().out
    assert "all steps in" in printed
    assert "chunk" in printed
    assert "*" in printed


def test_json(capsys):
    assert main([*SHORT, "--json", "--memory-budget", "least"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == ["BPTT", "SLTT"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-budget", "much"], "memory_budget must be a number of bytes"),
        (["--methods", "sltt", "sltt"], "--methods names a method twice"),
        (["--methods", "stdp"], "method must be"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys):
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_nothing_to_measure():
    with pytest.raises(ConfigurationError, match="at least one method"):
        plans(networks.conv_net(), *networks.images(), F.cross_entropy, 2, methods=())


def test_a_batch_in_the_input_shape(capsys):
    assert main([*SHORT, "--input-shape", "2,1,8,8"]) == 1
    assert "--input-shape has 4 numbers: leave out the batch, which is --batch" in capsys.readouterr().err
