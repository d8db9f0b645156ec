import copy
import os
import random
import subprocess
import sys
from pathlib import Path

import networks
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.checkpoint import CHECKSUM_BYTES, Checkpoints, read_checkpoint
from sltt_ext.errors import CheckpointError, SLTTWarning, WriteError

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


def cut(path, end):
    path.write_bytes(path.read_bytes()[:end])


SPOILED = {
    "truncated": lambda path: cut(path, -300),
    "without its checksum": lambda path: cut(path, -CHECKSUM_BYTES),
    "cut in its checksum": lambda path: cut(path, -1),
    "format only": lambda path: torch.save({"format": "sltt_ext checkpoint 1"}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint"),
    "foreign": lambda path: torch.save({"weight": torch.ones(1)}, path),
    "a whole module": lambda path: torch.save(nn.Linear(1, 1), path),
}


@pytest.mark.parametrize("how", sorted(SPOILED))
def test_a_file_that_cannot_be_used_is_refused_and_the_previous_one_used(saved, how):
    SPOILED[how](saved.last)
    with pytest.warns(
        SLTTWarning, match=r"last\.pt (is truncated|is damaged|was not written).*continuing from .*step 10"
    ):
        assert saved.resume() == 10
    assert saved.parts["net"].weight.item() == 1
    SPOILED[how](saved.previous)
    with pytest.raises(CheckpointError, match=r"last\.pt .*previous\.pt "):
        saved.resume()


def test_every_flipped_bit_is_noticed(saved):
    content, chance = saved.last.read_bytes(), random.Random(0)
    places = [chance.randrange(len(content)) for _ in range(100)]
    for place in [*places, *range(len(content) - CHECKSUM_BYTES, len(content))]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        saved.last.write_bytes(damaged)
        with pytest.warns(SLTTWarning, match=r"continuing from .*previous\.pt"):
            assert saved.resume() == 10, place


def test_a_checkpoint_of_an_earlier_version_has_no_checksum(saved):
    torch.save({**read_checkpoint(saved.last), "format": "sltt_ext checkpoint 1"}, saved.last)
    assert saved.resume() == 20


def test_any_error_of_a_damaged_file_is_typed(saved, monkeypatch):
    def raises(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(torch, "load", raises)
    with pytest.raises(
        CheckpointError, match=r"last\.pt is truncated, or is not a checkpoint \(AssertionError\); .*previous"
    ):
        saved.resume()


FOREIGN = {
    "weights of another shape": {"net": nn.Linear(3, 1).state_dict()},
    "weights of another name": {"net": {"bias": torch.ones(1)}},
    "no weights": {"net": 3},
    "a generator's state that is none": {"generator": torch.zeros(3, dtype=torch.uint8)},
    "an optimizer of other parameters": {
        "optimizer": torch.optim.Adam([torch.ones(1), torch.ones(1)]).state_dict()
    },
    "a part of what the trainer saves": {"online": {"generator": None}},
    "random numbers that are none": {"random": {"cpu": torch.ones(4), "cuda": []}},
    "random numbers of no generator": {"random": {}},
    "random numbers of a device more": {
        "random": {"cpu": torch.Generator().get_state(), "cuda": [torch.Generator().get_state()] * 2}
    },
}


@pytest.fixture
def run(tmp_path):
    """A run with every kind of part, and what it was when it was saved."""
    net = sltt_ext.convert(networks.conv_net())
    optimizer = torch.optim.Adam(net.parameters())
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, 2, k=1)
    online.forward_backward(*networks.images())
    optimizer.step()
    checkpoints = Checkpoints(
        tmp_path,
        generator=torch.Generator().manual_seed(1),
        net=net,
        online=online,
        optimizer=optimizer,
    )
    checkpoints.save(5)
    return checkpoints


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def states(parts):
    generators = {name: part.get_state() for name, part in parts.items() if isinstance(part, torch.Generator)}
    others = {
        name: copy.deepcopy(part.state_dict()) for name, part in parts.items() if name not in generators
    }
    return {**generators, **others, "torch": torch.get_rng_state()}


@pytest.mark.parametrize("what", sorted(FOREIGN))
def test_what_does_not_fit_leaves_everything_as_it_was(run, what, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    content = read_checkpoint(run.last)
    content["format"] = "sltt_ext checkpoint 1"
    content["parts"]["generator"] = torch.Generator().manual_seed(2).get_state()
    content["parts"]["net"]["0.weight"] += 1
    content["parts"]["online"]["generator"] = torch.Generator().get_state()
    for name, state in FOREIGN[what].items():
        (content if name == "random" else content["parts"])[name] = state
    torch.save(content, run.last)
    before, trainers_generator = states(run.parts), run.parts["online"].generator
    with pytest.raises(
        CheckpointError, match=r"last\.pt does not fit (generator|net|online|optimizer|torch)"
    ):
        run.resume()
    assert same(states(run.parts), before)
    assert run.parts["online"].generator is trainers_generator


def test_an_interrupt_while_loading_leaves_everything_as_it_was(run, monkeypatch):
    content = read_checkpoint(run.last)
    nn.init.zeros_(run.parts["net"][0].weight)
    before = states(run.parts)
    load_state_dict, calls = run.parts["optimizer"].load_state_dict, []

    def interrupted_once(state):
        load_state_dict(state)
        calls.append(state)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.parts["optimizer"], "load_state_dict", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        run.resume()
    assert same(states(run.parts), before)
    assert not torch.equal(content["parts"]["net"]["0.weight"], before["net"]["0.weight"])


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk(saved):
    partial = saved.last.with_name("last.pt.partial")
    partial.symlink_to("/dev/full")
    with pytest.raises(
        WriteError, match=r"last\.pt cannot be written \(No space left on device\): free some space"
    ):
        saved.save(30)
    assert not partial.is_symlink()
    assert saved.resume() == 20


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file cannot be written \(File exists\): choose another name"):
        Checkpoints(tmp_path / "file")


def test_other_parts(saved):
    other = Checkpoints(saved.last.parent, net=nn.Linear(1, 1), scheduler=None)
    with pytest.raises(CheckpointError, match="has the parts net, and this run has net, scheduler"):
        other.resume()


def test_generators_and_torchs_own_random_numbers(tmp_path):
    generator = torch.Generator().manual_seed(5)
    checkpoints = Checkpoints(tmp_path, data=generator)
    checkpoints.save(1)
    expected = torch.rand(3, generator=generator), torch.rand(3)
    checkpoints.resume()
    assert torch.equal(torch.rand(3, generator=generator), expected[0])
    assert torch.equal(torch.rand(3), expected[1])
