"""Ctrl-C at any moment of an iteration leaves the network as it was, and the next iteration right."""

import contextlib
import functools
import os
import random
import sys
from pathlib import Path

import oracle
import pytest
import torch
from invariant_networks import Standardised
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim import optimizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import sltt_ext
from sltt_ext import forwards
from sltt_ext.online import time_inside
from sltt_ext.online.packing import PackedSpikes

snntorch = pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly")
from spikingjelly.activation_based import functional, layer, neuron  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::sltt_ext.errors.SLTTWarning"),
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning"
    ),  # Python's, of generators it frees
]

ROOT = str(Path(sltt_ext.__file__).parent)
TRACED = (ROOT, contextlib.__file__)
T = 3
FEW = 12
"""Moments in a quick test, of thousands."""


def images():
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.rand(2, 1, 4, 4, generator=generator), torch.tensor([0, 2])


class Keeps(nn.Module):
    """Carries a tensor from step to step as a plain attribute."""

    trace = None

    def forward(self, x):
        self.trace = x if self.trace is None else 0.5 * self.trace + x
        return self.trace


def single_step(*more):
    torch.manual_seed(0)
    net = nn.Sequential(layer.Conv2d(1, 4, 3, padding=1), neuron.LIFNode(), layer.AvgPool2d(2))
    net += nn.Sequential(*more, layer.Flatten(), layer.Linear(16, 3))
    parametrize.register_parametrization(net[-1], "weight", Standardised())
    return net


def multi_step():
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4), neuron.ParametricLIFNode()
    )
    net += nn.Sequential(layer.AvgPool2d(2), neuron.QIFNode(), layer.Flatten(), layer.Linear(16, 3))
    functional.set_step_mode(net, "m")
    return net


def snntorch_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        snntorch.Leaky(beta=0.9, init_hidden=True, learn_beta=True),
        nn.BatchNorm2d(4),
        snntorch.Synaptic(alpha=0.8, beta=0.9, init_hidden=True),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def folded():
    from sltt_ext.snntorch import MultiStep

    return MultiStep(sltt_ext.convert(snntorch_net()))


SOME = {"schedule": lambda *_: [0, 2]}  # the same ones whenever they are drawn
CASES = {
    "parametrised weights, evaluated once": (single_step, {"pack_spikes": True}),
    "a kept tensor": (lambda: single_step(Keeps()), {}),
    "chunks": (multi_step, {"chunk": "auto", "pack_spikes": True, **SOME}),
    "the mean": (single_step, {"loss_on": "mean"}),
    "snnTorch": (snntorch_net, {"pack_spikes": True, **SOME}),
    "snnTorch, folded": (folded, {"chunk": 2}),
}  # fmt: skip


class Run:
    """A network and its trainer, so many iterations old."""

    def __init__(self, case, iterations=0):
        make, options = CASES[case]
        self.net = sltt_ext.convert(make())
        self.online = sltt_ext.OnlineTrainer(self.net, F.cross_entropy, T, **options)
        for _ in range(iterations):
            self.forward_backward()

    def forward_backward(self):
        self.online.forward_backward(*images())

    def predict(self):
        self.online.predict(images()[0])

    def revert(self):
        sltt_ext.revert(self.net)

    def convert(self):
        sltt_ext.convert(self.net)


class Interrupt:
    """Sees the moments of a call at which Python may handle a signal, and interrupts at one of them."""

    def __init__(self, at=None):
        self.at = at
        self.moments = []
        self.is_raised = False

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if not code.co_filename.startswith(TRACED):
            return None
        if event != "exception":
            self.moments.append((code.co_filename, frame.f_lineno, event))
            if len(self.moments) == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self

    def during(self, call):
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            self.is_raised = True
        except RuntimeError as error:  # what TorchScript makes of it, in SpikingJelly 0.0.0.0.14
            self.is_raised = True
            if "TorchScript interpreter" not in str(error):
                raise
        except (
            SystemError
        ) as error:  # and torch's own code around an autograd function, of one at its very end
            self.is_raised = isinstance(error.__cause__, KeyboardInterrupt)
            if not self.is_raised:
                raise
        finally:
            sys.settrace(None)
        return self

    def lines(self):
        """A moment of each line: the first and the last, of every other one."""
        last = {place: at for at, place in enumerate(self.moments, 1)}
        first = {place: at for at, place in reversed([*enumerate(self.moments, 1)])}
        return [(first, last)[n % 2][place] for n, place in enumerate(sorted(first)) if place[2] != "call"]


def picture(net):
    """What an interrupted iteration may leave behind, in the network and in torch; numbers that count iterations left out."""
    modules = list(net.modules())
    return {
        "classes": [type(module) for module in modules],
        "attributes": [
            {name: id(value) for name, value in vars(module).items() if not name.startswith(STATE)}
            for module in modules
        ],
        "entries": [
            {name: list(value) for name, value in vars(module).items() if isinstance(value, dict)} for module in modules
        ],
        "told": [getattr(module, "_sltt_steps", None) for module in modules],
        "optimizers' hooks": len(optimizer._global_optimizer_pre_hooks),
        "grad mode": torch.is_grad_enabled(),
        "modes": [
            mode
            for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())
            if not getattr(mode, "is_over", False)  # torch may put it back late: the next call takes it off
        ],
    }  # fmt: skip


STATE = ("_sltt_", "trace", "reset", "_folds")  # snnTorch keeps whether neurons were reset


def states(net):
    """What neurons and `Keeps` carry; None at rest."""
    found = [getattr(module, "trace", None) for module in net.modules()]
    for module in net.modules():
        found += vars(module).get("_memories", {}).values()
        found += [value for name, value in module._buffers.items() if name in ("mem", "syn")]
    found = [value.tolist() if isinstance(value, torch.Tensor) and value.any() else value for value in found]
    return [value if isinstance(value, list) else None for value in found]


def gradients(net):
    return [None if p.grad is None else p.grad.tolist() for p in net.parameters()]


@pytest.fixture
def packed(monkeypatch):
    """How many tensors were packed so far."""
    calls = []
    pack = PackedSpikes._pack
    monkeypatch.setattr(PackedSpikes, "_pack", lambda self, tensor: (calls.append(0), pack(self, tensor))[1])
    return calls


@functools.cache
def right_gradients(case):
    run = Run(case)
    run.forward_backward()
    return [p.grad for p in run.net.parameters()]


@functools.cache
def after(case, iterations, call):
    run = Run(case, iterations)
    getattr(run, call)()
    return states(run.net), gradients(run.net)


@functools.cache
def moments(case, iterations, call):
    return Interrupt().during(getattr(Run(case, iterations), call))


def check(case, iterations, call, at, packed):
    at_any = moments(case, iterations, call).moments
    run = Run(case, iterations)
    before, states_before, gradients_before = picture(run.net), states(run.net), gradients(run.net)
    if not Interrupt(at).during(getattr(run, call)).is_raised:
        return  # where Python itself ignores exceptions: a generator that is freed
    where = at_any[at - 1]
    assert picture(run.net) == before, where
    states_after, gradients_after = after(case, iterations, call)  # where it was over
    for state, *possible in zip(states(run.net), states_before, states_after, strict=True):
        assert state in (None, *possible), where
    assert gradients(run.net) in (gradients_before, gradients_after), where
    count = len(packed)
    torch.ones((), requires_grad=True).exp()
    assert len(packed) == count, where

    run.net.zero_grad()
    run.forward_backward()
    assert oracle.relative_error([p.grad for p in run.net.parameters()], right_gradients(case)) < 1e-5, where


def some(seen):
    """A few lines, half of them of what undoes changes."""
    undoing = [at for at in seen.lines() if seen.moments[at - 1][0] == forwards.__file__]
    return [at for lines in (undoing, seen.lines()) for at in random.Random(0).sample(lines, FEW // 2)]


def every(seen):
    """A twentieth of all lines, and all of them where they are asked for."""
    return seen.lines() if os.environ.get("SLTT_EVERY_LINE") else seen.lines()[::20]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("call", "iterations"), [("forward_backward", 0), ("forward_backward", 2), ("predict", 2)]
)
@pytest.mark.parametrize("chosen", [some, pytest.param(every, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_line(case, call, iterations, chosen, packed):
    """In the iteration that watches the network, in one that does not, and in a prediction."""
    for at in chosen(moments(case, iterations, call)):
        check(case, iterations, call, at, packed)


@pytest.mark.parametrize("call", ["convert", "revert"])
@pytest.mark.parametrize("case", ["chunks", "snnTorch"])
def test_an_interrupt_of_a_conversion(case, call):
    def made():
        make, _ = CASES[case]
        return make() if call == "convert" else sltt_ext.convert(make())

    run = getattr(sltt_ext, call)
    run(made())  # what is imported and made once
    seen = Interrupt().during(functools.partial(run, made()))
    whole = run(made())
    for at in seen.lines():
        net = made()
        before = picture(net)
        if Interrupt(at).during(functools.partial(run, net)).is_raised:
            kinds = [type(module) for module in net.modules()]
            is_over = kinds == [type(module) for module in whole.modules()]
            assert is_over or picture(net) == before, seen.moments[at - 1]


STEPS = 3


class RunsOverTime(nn.Module):
    """Reads the number of its steps from a global variable and from an attribute."""

    def __init__(self):
        super().__init__()
        self.T, self.body = STEPS, snntorch_net()

    def forward(self, x):
        return sum(self.body(x) for _ in range(STEPS)) / self.T


@pytest.mark.slow
def test_an_interrupt_leaves_the_number_of_steps_as_it_was():
    x, target = images()

    def made():
        net = sltt_ext.over_time(RunsOverTime(), time_inside=["STEPS", "T"])
        return net, lambda: F.cross_entropy(net(x), target).backward()

    whole, call = made()
    seen = Interrupt().during(call)
    files = [file for file, *_ in seen.moments]
    near = {
        place: at  # also where what it has changed is put back
        for at, place in enumerate(seen.moments, 1)
        if place[0] == forwards.__file__ and time_inside.__file__ in files[at - 25 : at]
    }
    lines = [at for at in seen.lines() if files[at - 1] == time_inside.__file__]
    assert len(near) > 20
    assert len(lines) > 50
    for at in (*lines, *near.values()):
        net, call = made()
        before = picture(net)
        Interrupt(at).during(call)
        assert STEPS == 3, seen.moments[at - 1]
        assert picture(net) == before, seen.moments[at - 1]
        net.zero_grad()
        call()
        assert oracle.relative_error(oracle.gradients(net), oracle.gradients(whole)) < 1e-6
