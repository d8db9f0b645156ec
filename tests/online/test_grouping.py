"""How many steps share a call: chosen by what was measured, and without any effect on the numbers."""

import copy
import warnings

import networks
import oracle
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import ActivationMeter, peak_activation_bytes
from sltt_ext.errors import ConfigurationError, SLTTWarning
from sltt_ext.online import grouping, planner

pytestmark = pytest.mark.usefixtures("bytes_alone")
T = 8
KEPT = {"pack_spikes": False, "cache_invariant": True}


def wide_net():
    """Many layers, so that a back-propagated step needs much more memory than one without gradients."""
    torch.manual_seed(0)
    layers = []
    for _ in range(6):
        layers += [layer.Conv2d(4, 4, 3, padding=1), layer.BatchNorm2d(4), neuron.LIFNode(v_threshold=0.3)]
    net = nn.Sequential(*layers, layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(4, 3))
    functional.set_step_mode(net, "m")
    return net


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(4, 4, 12, 12, generator=generator), torch.tensor([0, 1, 2, 0])


class Calls:
    """How many steps each call of a network had."""

    def __init__(self, net):
        self.steps = []
        net.register_forward_pre_hook(lambda module, inputs: self.steps.append(len(inputs[0])))


def iterations(net, count=4, x=None, **options):
    """Gradients and buffers after some iterations, and the calls of the last one."""
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, **KEPT | options)
    calls = Calls(net)
    for _ in range(count):
        calls.steps.clear()
        online.forward_backward(batch()[0] if x is None else x, batch()[1])
    return [*oracle.gradients(net), *(buffer.double() for buffer in net.buffers())], calls.steps


def fifth(time_steps, generator):
    return [4]


def test_steps_without_gradients_share_calls():
    net = wide_net()
    grouped, calls = iterations(copy.deepcopy(net), schedule=fifth)
    functional.set_step_mode(net, "s")
    single, _ = iterations(net, schedule=fifth)
    assert sum(calls) == T
    assert len(calls) < T
    assert oracle.relative_error(grouped, single) < 1e-6


def test_chunks_keep_their_batch_statistics():
    """Batch norm sees the same parts of a sequence, however many steps share a call."""
    once, _ = iterations(wide_net(), count=1, chunk=3, schedule=fifth, cache_invariant=False)
    torch.manual_seed(0)
    net = wide_net()
    online = sltt_ext.OnlineTrainer(
        sltt_ext.convert(net), F.cross_entropy, T, chunk=3, schedule=fifth, cache_invariant=False
    )
    for _ in range(3):
        online.forward_backward(*batch())  # measures
    net.load_state_dict(wide_net().state_dict())
    net.zero_grad()
    online.forward_backward(*batch())
    again = [*oracle.gradients(net), *(buffer.double() for buffer in net.buffers())]
    assert oracle.relative_error(again, once) < 1e-6


def test_sharing_does_not_raise_the_peak():
    net = sltt_ext.convert(wide_net())
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, schedule=fifth, **KEPT, chunk=1)
    peaks = []
    for _ in range(4):
        net.zero_grad()
        peaks.append(peak_activation_bytes(lambda: online.forward_backward(*batch()), net))
    assert peaks[-1] <= 1.05 * peaks[0]


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        (lambda net: net.insert(2, nn.Dropout(0.5)), False),
        (lambda net: net.insert(2, nn.Dropout(0.0)), True),
        (lambda net: net.append(nn.InstanceNorm1d(4, track_running_stats=True)), False),
    ],
    ids=["dropout", "no dropout", "unknown norm"],
)
def test_layers_that_tell_calls_apart(change, shared):
    net = wide_net()
    change(net)
    _, calls = iterations(net, schedule=fifth)
    assert (len(calls) < T) is shared


@pytest.mark.parametrize(
    ("budget", "calls"),
    [(10**9, [T]), ("0.9", [T]), (None, [1] * T), ("least", [1] * T), (1, [1] * T)],
    ids=["bytes", "part", "default", "least", "none"],
)
@pytest.mark.filterwarnings("ignore:memory_budget=")
def test_auto_takes_what_fits(budget, calls):
    automatic, actual = iterations(wide_net(), chunk="auto", memory_budget=budget)
    single, _ = iterations(wide_net())
    assert actual == calls
    assert oracle.relative_error(automatic, single) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"chunk": T, "k": 1},
        {"chunk": "auto", "k": 1},
        {"chunk": "auto", "schedule": lambda T, generator: [0, 2, 4]},
        {"chunk": 2, "schedule": lambda T, generator: [1, 3, 5]},
        {"schedule": lambda T, generator: range(T)},
    ],
    ids=["SLTT-1, sequence", "SLTT-1, auto", "every other step, auto", "short runs", "all steps"],
)
def test_measuring_ends(options, monkeypatch):
    """Counting the memory of every operator takes time: what never comes is not waited for."""
    meters = []
    monkeypatch.setattr(grouping, "ActivationMeter", lambda: meters.append(None) or ActivationMeter())
    generator = torch.Generator().manual_seed(0)
    online = sltt_ext.OnlineTrainer(
        sltt_ext.convert(wide_net()), F.cross_entropy, T, generator=generator, **KEPT, **options
    )
    online.predict(batch()[0])
    assert not meters
    for _ in range(20):
        online.forward_backward(*batch())
    assert len(meters) <= 4
    assert online.plan.is_decided
    online.predict(batch()[0])
    assert len(meters) <= 4


def test_auto_stays_within_the_budget():
    net = sltt_ext.convert(wide_net())

    def peak(online):
        net.zero_grad()
        return peak_activation_bytes(lambda: online.forward_backward(*batch()), net)

    plain = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, chunk=1)
    budget = 3 * peak(plain)
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, memory_budget=budget, **KEPT)
    peaks = [peak(online) for _ in range(6)]
    assert max(peaks) <= budget
    assert peaks[-1] > 1.5 * peaks[0]


def test_auto_measures_again_where_the_input_has_grown():
    net = sltt_ext.convert(wide_net())
    options = {"pack_spikes": False, "cache_invariant": False}
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, memory_budget=10**9, **options)
    calls = Calls(net)
    for pixels, expected in [
        (12, [1] * T),
        (12, [2] * 4),
        (12, [T]),
        (8, [T]),
        (16, [1] * T),
        (16, [2] * 4),
        (16, [T]),
    ]:
        calls.steps.clear()
        online.forward_backward(torch.rand(4, 4, pixels, pixels), batch()[1])
        assert calls.steps == expected


def test_auto_runs_a_single_step_network_step_by_step():
    net = sltt_ext.convert(networks.conv_net())
    x, target = networks.images()
    result = sltt_ext.OnlineTrainer(net, F.cross_entropy, 3, chunk="auto").forward_backward(x, target)
    assert result.output_steps == 3


def test_a_budget_below_one_step_says_so():
    with pytest.warns(
        SLTTWarning, match="less than the leanest plan needs, .* chunk 1 of 8.*a smaller batch needs less"
    ):
        iterations(wide_net(), memory_budget=12345, pack_spikes="auto")


def test_auto_does_not_see_into_compiled_networks():
    net = torch.compile(sltt_ext.convert(wide_net()), backend="eager")
    with pytest.raises(ConfigurationError, match="give chunk a number"):
        sltt_ext.OnlineTrainer(net, F.cross_entropy, T, chunk="auto").forward_backward(*batch())


@pytest.mark.parametrize("budget", [0, -1, "0", "1.5", "half", 0.5, 1.5, True, [1]])
def test_budgets_that_cannot_be(budget):
    with pytest.raises(ConfigurationError, match="memory_budget must be"):
        sltt_ext.OnlineTrainer(
            sltt_ext.convert(wide_net()), F.cross_entropy, T, chunk="auto", memory_budget=budget
        )


def test_a_budget_stays_what_it_was(monkeypatch):
    """Other programs come and go on a device: the same seed has to send the same calls."""
    available = iter([10**9, 1, 1])
    monkeypatch.setattr(planner, "in_bytes", lambda budget, net: next(available))
    net = sltt_ext.convert(wide_net())
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, memory_budget="0.8", **KEPT)
    for _ in range(4):
        online.forward_backward(*batch())
    resumed = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, memory_budget="0.8", **KEPT)
    resumed.load_state_dict(online.state_dict())
    calls = Calls(net)
    for trainer in (online, resumed):
        calls.steps.clear()
        trainer.forward_backward(*batch())
        assert calls.steps == [T]


def test_another_budget_is_looked_up():
    """What was measured holds; how much there may be is asked anew."""
    net = sltt_ext.convert(wide_net())
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, memory_budget=10**9, **KEPT)
    for _ in range(4):
        online.forward_backward(*batch())
    other = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, memory_budget="least", **KEPT)
    other.load_state_dict(online.state_dict())
    assert (online.plan.chunk, other.plan.chunk) == (T, 1)
    smaller = sltt_ext.OnlineTrainer(
        net, F.cross_entropy, T, memory_budget=online.plan.peak_bytes // 2, **KEPT
    )
    smaller.load_state_dict(online.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smaller.forward_backward(*batch())
    assert 1 < smaller.plan.chunk < T


def test_a_part_of_memory_that_cannot_be_told(monkeypatch):
    monkeypatch.delattr(grouping.os, "sysconf")
    with pytest.raises(ConfigurationError, match="give memory_budget in bytes"):
        iterations(wide_net(), chunk="auto")


def test_a_budget_needs_auto():
    with pytest.raises(ConfigurationError, match="set one of them to 'auto'"):
        sltt_ext.OnlineTrainer(
            sltt_ext.convert(wide_net()), F.cross_entropy, T, chunk=1, memory_budget=10**9, **KEPT
        )


def test_output_steps():
    net = sltt_ext.convert(networks.conv_net())
    x, target = networks.images()
    for full_output, steps in [(True, 6), (False, 3)]:
        online = sltt_ext.OnlineTrainer(
            net, F.cross_entropy, 6, schedule=lambda T, g: [2], full_output=full_output
        )
        result = online.forward_backward(x, target)
        net.eval()
        single = sltt_ext.OnlineTrainer(net, F.cross_entropy, steps).predict(x)
        assert result.output_steps == steps
        assert torch.allclose(result.output, single, atol=1e-6)


def test_a_resumed_run_sends_the_same_calls():
    net = sltt_ext.convert(wide_net())
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, memory_budget=10**9, **KEPT)
    for _ in range(3):
        online.forward_backward(*batch())
    resumed = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, memory_budget=10**9, **KEPT)
    resumed.load_state_dict(online.state_dict())
    calls = Calls(net)
    resumed.forward_backward(*batch())
    assert calls.steps == [T]


def test_a_need_is_that_of_the_most_demanding_call():
    need = grouping.Need(1, 100, 60)
    for call in [(1, 120, 30), (1, 90, 50), (2, 150, 70), (2, 170, 60), (1, 500, 500)]:
        need = need.with_another(*call)
    assert (need.peak, need.per_step, need.of(4), need.steps_within(300)) == (170, 50, 270, 4)
