import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sltt_ext.checkpoint import Checkpoints
from sltt_ext.errors import CheckpointError, SLTTWarning

HERE = Path(__file__).parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_again_and_again_ends_with_the_same_weights(tmp_path):
    seed = random.randrange(1000)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    command = [sys.executable, HERE / "interrupted_run.py", tmp_path, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, f"never killed, seed {seed}"
    killed, whole = (torch.load(tmp_path / name / "weights.pt") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], whole[name]) for name in whole), f"seed {seed}"


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints: weight 1 at step 10, weight 2 at step 20."""
    net = nn.Linear(1, 1, bias=False)
    checkpoints = Checkpoints(tmp_path, net=net)
    for step in (10, 20):
        nn.init.constant_(net.weight, step // 10)
        checkpoints.save(step)
    nn.init.zeros_(net.weight)
    return checkpoints


def test_resume(saved):
    assert saved.resume() == 20
    assert saved.parts["net"].weight.item() == 2
    assert sorted(path.name for path in saved.last.parent.iterdir()) == ["last.pt", "previous.pt"]


def test_no_checkpoint_yet(tmp_path):
    assert Checkpoints(tmp_path, net=nn.Linear(1, 1)).resume() == 0


def truncated(path):
    path.write_bytes(path.read_bytes()[:-300])


SPOILED = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint"),
    "foreign": lambda path: torch.save({"weight": torch.ones(1)}, path),
    "a whole module": lambda path: torch.save(nn.Linear(1, 1), path),
}


@pytest.mark.parametrize("how", sorted(SPOILED))
def test_a_file_that_cannot_be_used_is_refused_and_the_previous_one_used(saved, how):
    SPOILED[how](saved.last)
    with pytest.warns(SLTTWarning, match=r"last\.pt (is truncated|was not written).*going on from .*step 10"):
        assert saved.resume() == 10
    assert saved.parts["net"].weight.item() == 1
    SPOILED[how](saved.previous)
    with pytest.raises(CheckpointError, match=r"last\.pt .*previous\.pt "):
        saved.resume()


def test_killed_between_the_two_renames(saved):
    saved.last.rename(saved.previous)
    assert saved.resume() == 20


def test_killed_while_writing(saved, monkeypatch):
    def stops_half_way(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stops_half_way)
    with pytest.raises(KeyboardInterrupt):
        saved.save(30)
    assert saved.resume() == 20


def test_other_parts(saved):
    other = Checkpoints(saved.last.parent, net=nn.Linear(1, 1), scheduler=None)
    with pytest.raises(CheckpointError, match="has the parts net, this run has net, scheduler"):
        other.resume()


def test_generators_and_torchs_own_random_numbers(tmp_path):
    generator = torch.Generator().manual_seed(5)
    checkpoints = Checkpoints(tmp_path, data=generator)
    checkpoints.save(1)
    expected = torch.rand(3, generator=generator), torch.rand(3)
    checkpoints.resume()
    assert torch.equal(torch.rand(3, generator=generator), expected[0])
    assert torch.equal(torch.rand(3), expected[1])
