"""The scripts of docs/scaling.md, each run as printed."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import alive
import pytest
import torch
from torch.nn import functional as F

import sltt_ext
from sltt_ext.neuron import TRACES_NEURONS

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
TASK = BLOCKS[0]
SCRIPTS = {re.match(r"# (\w+)\.py", block).group(1): block for block in BLOCKS if block.startswith("# ")}
OTHERS = [block for block in BLOCKS[1:] if not block.startswith("# ")]
KNOWS = [block for block in OTHERS if TRACES_NEURONS or "compile=True" not in block]
"""Without what an older torch refuses."""
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)

ABORTED_AT_EXIT = "terminate called without an active exception"
"""What gloo's threads say, rarely, as a process ends whose work is done (pytorch/pytorch#179291)."""


def run(tmp_path, script, *launcher):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "script.py").write_text(script)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
    }
    command = [sys.executable, *launcher, "script.py"]
    for _ in range(3):
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment, timeout=300
        )
        if ABORTED_AT_EXIT not in done.stderr:
            break
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_in_two_processes(tmp_path, name):
    if name == "fsdp" and OLD:
        pytest.skip("fully_shard on the CPU needs torch 2.7")
    if name == "lit" and find_spec("lightning") is None:
        pytest.skip("needs lightning")
    done = run(tmp_path, SCRIPTS[name], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout or (tmp_path / "logs").exists()


def test_the_others(tmp_path):
    done = run(tmp_path, "\n".join(KNOWS))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "last.pt").exists()


def test_their_network_learns():
    names = {}
    exec(TASK, names)
    net, (x, target) = names["network"](), names["train_set"][:64]
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, time_steps=4)
    alive.check(net, lambda: online.forward_backward(x, target).loss)


def test_every_recipe_is_run():
    assert sorted(SCRIPTS) == ["ddp", "fsdp", "lit"]
