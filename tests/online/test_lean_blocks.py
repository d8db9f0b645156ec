"""The leanest plan, which may go block by block by itself: where it needs less, and gives the same; else as a whole."""

import copy

import oracle
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.errors import LossError, SLTTWarning
from sltt_ext.online import block_plan

T = 4
WHOLE = {"chunk": 1, "pack_spikes": True, "cache_invariant": False}


def deep(*between):
    """A network whose states need more than its borders."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(layer.Conv2d(8, 8, 3, padding=1), layer.BatchNorm2d(8), neuron.LIFNode(v_threshold=0.3))
        for _ in range(8)
    ]
    return nn.Sequential(
        *blocks[:4], *between, *blocks[4:], layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(8, 5)
    ).double()


def data():
    torch.manual_seed(1)
    return torch.randn(8, 8, 16, 16, dtype=torch.float64), torch.arange(8) % 5


def trained(net, iterations=8, loss_fn=F.cross_entropy, data=data, **options):
    """Gradients and buffers of each iteration, and the trainer."""
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), loss_fn, T, **options)
    x, target = data()
    found = []
    for _ in range(iterations):
        net.zero_grad()
        output = online.forward_backward(x, target).output
        buffers = [buffer.double().clone() for buffer in net.buffers()]
        gradients = (None if gradient is None else gradient.clone() for gradient in oracle.gradients(net))
        found.append([*gradients, output, *buffers])
    return found, online


def made(make):
    torch.manual_seed(0)
    return make()


def is_as_a_whole(make, step_mode="s", **options):
    """Whether every iteration of the leanest plan is that of the network as a whole; and the trainer."""
    net, other = made(make), made(make)
    for one in (net, other):
        functional.set_step_mode(one, step_mode)
    found, online = trained(net, memory_budget="least", **options)
    expected, _ = trained(other, **WHOLE, **options)
    return all(oracle.relative_error(*pair) < 1e-12 for pair in zip(found, expected, strict=True)), online


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize(
    "options", [{}, {"schedule": lambda *_: [1, 3]}, {"backward": lambda loss: loss.backward()}]
)
def test_it_goes_block_by_block_where_that_needs_less(step_mode, options):
    same, online = is_as_a_whole(deep, step_mode, **options)
    assert same
    assert online.plan.is_decided
    assert online.plan.blocks > 2
    assert f"block by block ({online.plan.blocks})" in str(online.plan)
    other = trained(deep(), **WHOLE)[1]
    peaks = [peak_activation_bytes(lambda: one.forward_backward(*data()), one.net) for one in (online, other)]  # noqa: B023
    assert peaks[0] < 0.9 * peaks[1]
    assert online.plan.peak_bytes == pytest.approx(peaks[0], rel=0.15)


def test_without_the_budget_nothing_goes_block_by_block():
    assert trained(deep())[1].plan.blocks == 1
    assert trained(deep(), memory_budget="1GiB")[1].plan.blocks == 1


class CountsSteps(nn.Module):
    """It acts from its third step on: as a module of a network, it is one node of it."""

    def __init__(self):
        super().__init__()
        self.t = 0

    def forward(self, x):
        self.t += 1
        return x


class ReadsSteps(nn.Module):
    """Its own forward leaves nothing behind, and is another one at each step."""

    def __init__(self):
        super().__init__()
        self.net, self.steps = deep(), CountsSteps()

    def forward(self, x):
        x = self.steps(x)
        return self.net(x if self.steps.t % T < 2 else 2 * x)


class Raises(layer.Conv2d):
    """It does not run as a whole without gradients, as it does to be compared."""

    def forward(self, x):
        if not torch.is_grad_enabled():
            raise LossError("not without gradients")
        return super().forward(x)


def hooked(register):
    def make():
        net = deep()
        register(net[3][0])
        return net

    return make


class History:
    """Whether the last call was with gradients, and how often one has raised."""

    learns, raised = True, 0


class RaisesAgain(nn.Module):
    """It runs with gradients alone, or without alone: block by block, the blocks behind it have their gradients when it raises."""

    def __init__(self):
        super().__init__()
        self.history = History()  # which nobody puts back

    def forward(self, x):
        before, self.history.learns = self.history.learns, torch.is_grad_enabled()
        if self.history.learns and not before:
            self.history.raised += 1
            raise LossError("not first without gradients")
        return x


WHOLE_NETWORKS = {
    "decides by the step": ReadsSteps,
    "draws": lambda: deep(layer.Dropout(0.2)),
    "hook": hooked(lambda conv: conv.register_forward_hook(lambda *_: None)),
    "hook before": hooked(lambda conv: conv.register_forward_pre_hook(lambda *_: None)),
    "hook on a gradient": hooked(lambda conv: conv.weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))),
    "raises in the second run": lambda: deep(RaisesAgain()),
    "raises": lambda: deep(Raises(8, 8, 1)),
    "float borders": lambda: nn.Sequential(layer.Conv2d(8, 8, 3), layer.Flatten(), neuron.LIFNode(), layer.Linear(1568, 5)).double(),
}  # fmt: skip


WHOLE_NETWORKS_SAY = {
    "decides by the step": "; as a whole: it gives another output block by block",
    "draws": "; as a whole: it draws random numbers",
    "hook": "; as a whole: it has hooks",
    "hook before": "; as a whole: it has hooks",
    "hook on a gradient": "; as a whole: it has hooks",
    "raises in the second run": "; as a whole: LossError: not first without gradients",
    "raises": "; as a whole: LossError: not without gradients",
    "float borders": "",
}


@pytest.mark.parametrize("name", WHOLE_NETWORKS)
def test_networks_that_run_as_a_whole(name):
    same, online = is_as_a_whole(WHOLE_NETWORKS[name])
    assert same
    assert online.plan.is_decided
    assert online.plan.blocks == 1
    assert WHOLE_NETWORKS_SAY[name] in str(online.plan)
    if name == "raises in the second run":
        assert online.net[4].history.raised == 1


def test_a_hook_on_all_modules_sees_each_step_once():
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        online = trained(deep(), memory_budget="least")[1]
        seen.clear()
        online.forward_backward(*data())
    finally:
        hook.remove()
    assert seen.count(online.net[2]) == T


def test_an_iterator_of_frames():
    x, target = data()
    net = deep()
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, memory_budget="least")
    for _ in range(10):
        online.forward_backward(iter([x] * T), target)
    assert online.plan.blocks == 1


def test_errors_of_the_user_are_raised_as_ever():
    online = trained(deep(), memory_budget="least")[1]
    assert online.plan.blocks > 1
    online.net.zero_grad()
    online.loss_fn = lambda output, target: output
    with pytest.raises(LossError):
        online.forward_backward(*data())
    assert all(parameter.grad is None for parameter in online.net.parameters())
    assert online.plan.blocks > 1


def test_a_hook_that_comes_later():
    online = trained(deep(), memory_budget="least")[1]
    seen = []
    online.net[2].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(SLTTWarning, match="as a whole again"):
        online.forward_backward(*data())
    assert len(seen) == T
    assert online.plan.blocks == 1


@pytest.mark.parametrize("interrupted", [2, 6])
def test_a_run_that_is_resumed(interrupted, tmp_path):
    whole, online = trained(deep(), memory_budget="least")
    first = trained(deep(), interrupted, memory_budget="least")[1]
    torch.save({"net": first.net.state_dict(), "online": first.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    net = sltt_ext.convert(deep())
    net.load_state_dict(saved["net"])
    resumed = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, memory_budget="least")
    resumed.load_state_dict(saved["online"])
    assert resumed.plan == first.plan
    assert resumed.state_dict()["blocks"] == first.state_dict()["blocks"]
    for expected in whole[interrupted:]:
        net.zero_grad()
        resumed.forward_backward(*data())
        assert all(map(torch.equal, oracle.gradients(net), expected))
    assert resumed.plan.blocks == online.plan.blocks > 1


def test_larger_inputs_are_measured_anew():
    net = deep()
    online = trained(net, memory_budget="least")[1]
    x, target = data()
    before, x, target = online.plan.peak_bytes, x.repeat(2, 1, 1, 1), target.repeat(2)
    for _ in range(12):
        online.forward_backward(x, target)
    assert online.plan.blocks > 1
    assert online.plan.peak_bytes > 1.5 * before


def test_snntorch():
    import snntorch

    def make():
        torch.manual_seed(0)
        blocks = [
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), snntorch.Leaky(beta=0.5, threshold=0.3, init_hidden=True))
            for _ in range(8)
        ]  # fmt: skip
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(8 * 256, 5))

    def images():
        x, target = data()
        return x.float().repeat(4, 1, 1, 1), target.repeat(4)

    found, online = trained(make(), data=images, memory_budget="least")
    expected, _ = trained(make(), data=images, **WHOLE)
    assert online.plan.blocks > 1
    number = 1 + len([*online.net.parameters()])  # and no buffers: states are at rest, block by block
    pairs = [(mine[:number], theirs[:number]) for mine, theirs in zip(found, expected, strict=True)]
    assert all(oracle.relative_error(*pair) < 1e-5 for pair in pairs)


def test_no_part_of_a_smaller_batch_has_fewer_than_four_samples(monkeypatch):
    """Such as the last one of an epoch, with the parts that were chosen for a larger one."""
    x, target = (tensor.repeat(4, *[1] * (tensor.dim() - 1)) for tensor in data())
    net = deep().eval()  # norms that read a sample at a time
    _, online = trained(net, data=lambda: (x, target), memory_budget="least")
    sizes = []
    samples = block_plan.Samples
    monkeypatch.setattr(
        block_plan, "Samples", lambda *given: sizes.append(given[2] - given[1]) or samples(*given)
    )
    online.forward_backward(x, target)
    assert 4 in sizes  # of 32, in eight parts
    sizes.clear()
    online.forward_backward(x[:9], target[:9])
    assert sorted(set(sizes)) == [4, 5]


def test_against_the_oracle():
    net = deep().eval()
    x, target = data()
    expected = oracle.sltt_gradients(copy.deepcopy(net), [x] * T, target, F.cross_entropy)
    trained(net, memory_budget="least")
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-12
