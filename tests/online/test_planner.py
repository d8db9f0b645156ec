"""The plan of a trainer: the same gradients whatever it is, an end to measuring, and the same plan in a resumed run."""

import copy
import itertools
from dataclasses import replace

import networks
import oracle
import products
import pytest
import torch
from planned import PLAIN, T, normed, trained
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, SLTTWarning
from sltt_ext.online import grouping, planner, stopwatch
from sltt_ext.online.grouping import ActivationMeter
from sltt_ext.online.plan import Plan, size_of

packs_by_itself = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="older torch does not tell whether others save tensors",
)


NETWORKS = {
    "single-step": lambda: networks.conv_net(v_threshold=0.3),
    "multi-step": lambda: networks.conv_net(step_mode="m", v_threshold=0.3),
    "norms, single-step": normed,
    "norms, multi-step": lambda: normed("m"),
}
LOOPS = {
    "SLTT": {},
    "SLTT-2": {"schedule": lambda T, generator: [1, 3]},
    "two in a row, no tail": {"schedule": lambda T, generator: [1, 2], "full_output": False},
    "mean": {"loss_on": "mean"},
}


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("make", "loop"), products.spread(NETWORKS, itertools.product(LOOPS, ["no budget", "1GiB"]), each=2)
)
def test_every_iteration_has_the_same_gradients(make, loop):
    options, budget = LOOPS[loop[0]], None if loop[1] == "no budget" else loop[1]
    planned, online = trained(NETWORKS[make](), memory_budget=budget, **options)
    plain, _ = trained(NETWORKS[make](), len(planned), **options, **PLAIN)
    assert online.plan.is_decided
    assert all(oracle.relative_error(a, b) < 1e-6 for a, b in zip(planned, plain, strict=True))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("make", ["single-step", "norms, single-step"])
def test_a_network_of_single_steps_is_run_on_sequences(make):
    """Where calls are all that takes time, all steps share one."""
    _, online = trained(NETWORKS[make]())
    plan = online.plan
    assert (plan.chunk, plan.in_sequences) == (T, True)
    assert all(module.step_mode == "s" for module in online.net if hasattr(module, "step_mode"))


@pytest.mark.parametrize("options", [{}, {"k": 1, "full_output": False}, {"memory_budget": "least"}, PLAIN])
@pytest.mark.parametrize("make", ["single-step", "norms, multi-step"])
def test_measuring_ends(make, options, monkeypatch):
    measured = []
    for room, name in ((planner, "Stopwatch"), (grouping, "ActivationMeter")):
        kind = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *args, kind=kind: measured.append(kind) or kind(*args))
    _, online = trained(NETWORKS[make](), 30, **options)
    assert online.plan.is_decided
    assert len(measured) < 28
    before = len(measured)
    trained_on(online, 3)
    online.predict(networks.images(4)[0])
    assert len(measured) == before
    assert bool(measured) is (options is not PLAIN)


def trained_on(online, iterations):
    for _ in range(iterations):
        online.net.zero_grad()
        online.forward_backward(*networks.images(4))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("make", "interrupted"), [("single-step", 2), ("single-step", 8), ("norms, multi-step", 1)]
)
def test_a_run_that_is_resumed_while_it_measures(make, interrupted, tmp_path):
    whole, online = trained(NETWORKS[make]())
    net = sltt_ext.convert(NETWORKS[make]())
    first = sltt_ext.OnlineTrainer(net, F.cross_entropy, T)
    trained_on(first, interrupted)
    torch.save({"net": net.state_dict(), "online": first.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = sltt_ext.convert(NETWORKS[make]())
    again.load_state_dict(saved["net"])
    resumed = sltt_ext.OnlineTrainer(again, F.cross_entropy, T)
    resumed.load_state_dict(saved["online"])
    assert resumed.plan == first.plan
    x, target = networks.images(4)
    for expected in whole[interrupted:]:
        again.zero_grad()
        resumed.forward_backward(x, target)
        assert all(map(torch.equal, oracle.gradients(again), expected))
    assert resumed.plan.peak_bytes == pytest.approx(
        online.plan.peak_bytes, rel=1e-3
    )  # who watches needs some bytes
    assert replace(resumed.plan, peak_bytes=0) == replace(online.plan, peak_bytes=0)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("make", ["multi-step", "norms, multi-step"])
def test_the_longest_calls_are_counted_themselves(make):
    _, online = trained(NETWORKS[make]())
    assert online.plan.chunk == T
    online.net.zero_grad()
    with ActivationMeter() as meter:
        online.forward_backward(*networks.images(4))
    assert online.plan.peak_bytes == pytest.approx(meter.peak_bytes, rel=0.01)


def test_a_plan_in_a_line():
    plan = Plan(6, 4, 4, False, True, True, 12, int(1.9 * 2**30), 6 * 2**30)
    assert str(plan) == "chunk 4 of 6, spikes as bits, 12 modules once; 1.9 GiB of 6.0 GiB"
    measuring = Plan(6, 1, 6, True, False, False, 0, measuring="bytes of chunk 2")
    assert (
        str(measuring)
        == "chunk 1 of 6, 6 without gradients, run on sequences; still measuring: bytes of chunk 2"
    )
    assert [size_of(n) for n in (0, 1024, 2**41)] == ["0 bytes", "1.0 KiB", "2.0 TiB"]


def test_what_the_user_says_is_the_plan_from_the_start():
    online = sltt_ext.OnlineTrainer(
        sltt_ext.convert(normed("m")), F.cross_entropy, T, chunk=2, pack_spikes=True, cache_invariant=False
    )
    assert str(online.plan) == "chunk 2 of 4, spikes as bits"
    assert online.plan.is_decided


def test_the_leanest_needs_least():
    def peak(**options):
        net = normed()
        _, online = trained(net, 10, **options)
        net.zero_grad()
        with ActivationMeter() as meter:
            online.forward_backward(*networks.images(4))
        return meter.peak_bytes

    least = peak(memory_budget="least")
    others = [
        {"chunk": 1, "pack_spikes": packs, "cache_invariant": caches}
        for packs in (True, False)
        for caches in (True, False)
    ]
    assert all(least <= peak(**options) for options in others)


@packs_by_itself
@pytest.mark.usefixtures("clock")
def test_a_budget_that_no_plan_fits():
    with pytest.warns(
        SLTTWarning, match=r"less than the leanest plan needs, .* for chunk 1 of 4, spikes as bits"
    ) as told:
        _, online = trained(normed(), memory_budget="1KiB")
    assert sum("leanest" in str(one.message) for one in told) == 1
    assert (online.plan.chunk, online.plan.pack_spikes) == (1, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget": "leanest"}, "memory_budget must be"),
        ({"memory_budget": 1, **PLAIN}, "set one of them to 'auto'"),
        ({"pack_spikes": "yes"}, "pack_spikes must be True, False or 'auto', got 'yes'"),
        ({"cache_invariant": None}, "cache_invariant must be True, False or 'auto'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigurationError, match=message):
        sltt_ext.OnlineTrainer(sltt_ext.convert(normed()), F.cross_entropy, T, **options)


class Flattening(nn.Module):
    """Code of the user's own between layers that take both forms."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.neuron, self.head = (
            layer.Conv2d(1, 6, 3),
            neuron.LIFNode(v_threshold=0.3),
            layer.Linear(216, 5),
        )

    def forward(self, x):
        return self.head(torch.flatten(self.neuron(self.conv(x)), 1))


class Viewing(Flattening):
    def forward(self, x):
        return self.head(self.neuron(self.conv(x)).view(-1, 216))


class OverTheBatch(Flattening):
    def forward(self, x):
        return self.head(self.neuron(self.conv(x)).flatten(-3)) / (1 + x.abs().max())


class Elementwise(Flattening):
    def forward(self, x):
        return self.head(self.neuron(self.conv(2 * x)).flatten(-3)) + 1


class OfTheirOwn(layer.Conv2d):
    pass


def inserted(*modules):
    net = networks.conv_net(v_threshold=0.3)
    return nn.Sequential(*net[:2], *modules, *net[2:])


def hooked():
    net = networks.conv_net(v_threshold=0.3)
    net[1].register_forward_hook(lambda module, inputs, output: None)
    return net


def recording():
    return networks.conv_net(v_threshold=0.3, store_v_seq=True)


REFUSED = {
    "flatten in forward": Flattening,
    "view in forward": Viewing,
    "a number of the whole batch": OverTheBatch,
    "torch's convolution": lambda: inserted(nn.Conv2d(6, 6, 3, padding=1)),
    "torch's flatten": lambda: nn.Sequential(*networks.conv_net()[:-2], nn.Flatten(), layer.Linear(96, 5)),
    "a subclass": lambda: inserted(OfTheirOwn(6, 6, 3, padding=1)),
    "a hook": hooked,
    "a record": recording,
    "dropout": lambda: inserted(layer.Dropout(0.5)),
}


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("make", REFUSED)
def test_networks_that_stay_with_single_steps(make, recwarn):
    _, online = trained(REFUSED[make]())
    assert not online.plan.in_sequences
    assert not [one for one in recwarn if issubclass(one.category, SLTTWarning)]


@pytest.mark.usefixtures("clock")
def test_code_that_treats_all_numbers_alike():
    planned, online = trained(Elementwise())
    plain, _ = trained(Elementwise(), len(planned), **PLAIN)
    assert online.plan.in_sequences
    assert all(oracle.relative_error(a, b) < 1e-6 for a, b in zip(planned, plain, strict=True))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    "options", [{"output": lambda output: output[:, :4]}, {"chunk": 1}, {"on_step": lambda t: None}]
)
def test_options_that_keep_single_steps(options):
    _, online = trained(networks.conv_net(v_threshold=0.3), **options)
    assert not online.plan.in_sequences


@pytest.mark.usefixtures("clock")
def test_a_hook_that_comes_later_sees_single_steps():
    _, online = trained(networks.conv_net(v_threshold=0.3))
    shapes = []
    online.net[0].register_forward_hook(lambda module, inputs, output: shapes.append(output.dim()))
    trained_on(online, 1)
    assert shapes
    assert set(shapes) == {4}


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_modules_are_told_back(error):
    net = networks.conv_net(v_threshold=0.3)
    _, online = trained(net)
    before = [copy.copy(vars(module)) for module in net]
    online.loss_fn, loss_fn = raising(error), online.loss_fn
    with pytest.raises(error):
        trained_on(online, 1)
    assert [module.step_mode for module in net] == ["s"] * len(net)
    assert [{*vars(module)} for module in net] == [{*own} for own in before]
    online.loss_fn = loss_fn
    trained_on(online, 1)
    assert online.plan.in_sequences


def raising(error):
    def loss_fn(output, target):
        raise error

    return loss_fn


@packs_by_itself
def test_deterministic_algorithms_leave_the_clock_alone(monkeypatch):
    monkeypatch.setattr(stopwatch, "now", lambda: pytest.fail("somebody looks at the clock"))
    torch.use_deterministic_algorithms(True)
    try:
        plans = [str(trained(normed())[1].plan) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert plans[0] == plans[1]
    assert plans[0].startswith("chunk 1 of 4, spikes as bits")


def test_saving_hooks_of_the_users_own_are_left_alone():
    saved = []
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(normed()), F.cross_entropy, T)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        trained_on(online, 1)
    assert saved
    assert not online._planner._measured.packed


def test_a_network_through_time_keeps_one_step():
    """Where nobody names a window there is none: `chunk` decides over the gradient."""
    net = sltt_ext.convert(networks.conv_net(), temporal="call")
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T)
    trained_on(online, 1)
    assert online.chunk == online.plan.chunk == 1


def test_inputs_that_grow_are_measured_anew():
    _, online = trained(normed(), memory_budget="least")
    x, target = networks.images(8)
    online.forward_backward(x, target)
    assert not online.plan.is_decided


class ReadsSparse(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.neuron, self.head = (
            nn.Parameter(torch.randn(6, 8)),
            neuron.LIFNode(),
            layer.Linear(8, 3),
        )

    def forward(self, x):
        return self.head(self.neuron(torch.sparse.mm(x, self.weight)))


def test_sparse_frames_are_counted_as_they_are():
    x, target = (torch.rand(4, 6) * 3).to_sparse(), torch.tensor([0, 1, 2, 0])
    results = []
    for options in ({}, PLAIN):
        online = sltt_ext.OnlineTrainer(sltt_ext.convert(ReadsSparse()), F.cross_entropy, T, **options)
        online.forward_backward(x, target)
        results.append(oracle.gradients(online.net))
    assert oracle.relative_error(*results) < 1e-6


def test_a_compiled_network_is_run_as_it_is_said():
    net = torch.compile(sltt_ext.convert(normed("m")), backend="eager")
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T)
    trained_on(online, 1)
    assert str(online.plan) == "chunk 1 of 4"
