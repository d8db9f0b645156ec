import itertools
import os
import sys
import tempfile
from contextlib import suppress

import pytest
import torch
from _pytest.doctest import DoctestModule

torch.set_num_threads(1)  # the suite runs in parallel processes
sys.modules.setdefault(
    "torchaudio", None
)  # SpikingJelly asks for it; its last release refuses newer torches in transformers

with suppress(ImportError):  # which some environments are without
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


def pytest_configure(config):
    """One folder for what the processes of a session build."""
    if "SLTT_BUILT" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="sltt-built-")
        os.environ["SLTT_BUILT"] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path, parent):
    """No doctests in test files: a file that cannot be imported is skipped as one, and its tests with it, in silence."""
    collectors = yield
    return [one for one in collectors if not isinstance(one, DoctestModule)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def bytes_alone(monkeypatch):
    """Plans are decided by bytes, which are the same in every run, and not by seconds."""
    monkeypatch.setattr("sltt_ext.online.planner.may_be_timed", lambda net: False)


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock is a second later: a plan is as fast as it has few calls."""
    ticks = itertools.count()
    monkeypatch.setattr("sltt_ext.online.stopwatch.now", lambda: float(next(ticks)))
    return ticks
