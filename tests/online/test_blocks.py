"""`OnlineTrainer(compile=True)`: equal results, nothing compiled after the warm-up, what is time-invariant evaluated once."""

import copy
import pickle

import networks
import oracle
import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import sltt_ext
from sltt_ext.errors import CompilationError, ConfigurationError, SLTTWarning
from sltt_ext.neuron import TRACES_NEURONS
from sltt_ext.online import blocks
from sltt_ext.snntorch import MultiStep

T = 4
pytestmark = pytest.mark.skipif(not TRACES_NEURONS, reason="older torch keeps neurons as one operator each")

X, TARGET = networks.images(4)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(blocks, "_BACKEND", "eager")  # traces, and compiles nothing
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, parametrised, node):
        super().__init__()
        self.conv, self.norm, self.sn = layer.Conv2d(6, 6, 3, padding=1), layer.BatchNorm2d(6), node()
        if parametrised:
            parametrizations.weight_norm(self.conv)

    def forward(self, x):
        return x + self.sn(self.norm(self.conv(x)))


class Net(nn.Module):
    """A stem, equal blocks, and a head."""

    def __init__(self, step_mode="s", parametrised=False, node=neuron.LIFNode):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.sn = layer.Conv2d(1, 6, 3, padding=1), node()
        self.body = nn.Sequential(*(Block(parametrised, node) for _ in range(3)))
        self.head = nn.Sequential(layer.MaxPool2d(2), layer.Flatten(), layer.Linear(96, 5))
        functional.set_step_mode(self, step_mode)
        networks.freeze_batch_norm(self)

    def forward(self, x):
        return self.head(self.body(self.sn(self.stem(2 * x))))


def leaky_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), snntorch.Leaky(beta=0.8, learn_beta=True, init_hidden=True),
        nn.Linear(12, 5), snntorch.Leaky(beta=0.9, reset_mechanism="zero", init_hidden=True),
    )  # fmt: skip


def soft():
    return neuron.ParametricLIFNode(v_reset=None, surrogate_function=surrogate.ATan())


NETS = {
    "sequential": networks.conv_net,
    "sequential, multi-step": lambda: networks.conv_net(step_mode="m"),
    "blocks": Net,
    "blocks, multi-step": lambda: Net("m"),
    "blocks, parametrised": lambda: Net(parametrised=True),
    "blocks, PLIF, soft reset": lambda: Net(node=soft),
    "snnTorch": leaky_net,
}
OPTIONS = {
    "sequential": {"k": 2},
    "sequential, multi-step": {"chunk": T},
    "blocks": {},
    "blocks, multi-step": {"k": 2},
    "blocks, parametrised": {},
    "blocks, PLIF, soft reset": {"loss_on": "mean"},
    "snnTorch": {"k": 2},
}
ROUNDS = dict.fromkeys(NETS, 0) | {"blocks, multi-step": 1}
SLOW = ["sequential", "sequential, multi-step", "blocks", "blocks, parametrised", "blocks, PLIF, soft reset"]
CASES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETS]


PLAN = {"chunk": 1, "pack_spikes": False, "cache_invariant": True}
"""Nothing has to be measured before something is compiled."""


def pair(net, **options):
    """A trainer that compiles, and one that does not, of equal networks."""
    net = sltt_ext.convert(net)
    plain = sltt_ext.OnlineTrainer(copy.deepcopy(net), F.cross_entropy, T, **{**PLAN, **options})
    return sltt_ext.OnlineTrainer(net, F.cross_entropy, T, compile=True, **{**PLAN, **options}), plain


def graphs():
    return counters["stats"]["unique_graphs"]


def iterate(online, seed, x=X, target=TARGET):
    torch.manual_seed(seed)  # the same steps
    return online.forward_backward(x, target)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_network_as_it_is(name):
    online, plain = pair(NETS[name](), **OPTIONS[name])
    seen = []
    for iteration in range(6):
        n = 4 if iteration % 2 == 0 else 3  # every other batch is smaller
        results = [iterate(trainer, iteration, X[:n], TARGET[:n]) for trainer in (online, plain)]
        # steps without gradients share a call where nothing is compiled, and a convolution may round differently
        torch.testing.assert_close(results[0].output, results[1].output, rtol=0, atol=1e-6 * ROUNDS[name])
        seen.append(graphs())
    assert oracle.relative_error(oracle.gradients(online.net), oracle.gradients(plain.net)) < 1e-6
    assert seen[0] == 0 < seen[2]  # the first iteration is watched
    assert seen[3] == seen[4] == seen[5]
    for _ in range(2):
        torch.testing.assert_close(online.predict(X), plain.predict(X), rtol=0, atol=1e-6 * ROUNDS[name])


@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["sequential", "blocks, multi-step", "snnTorch"])
def test_spikes_of_the_compiler(monkeypatch, name, backend):
    monkeypatch.setattr(blocks, "_BACKEND", backend)
    online, plain = pair(NETS[name]())
    fired = [[], []]
    for trainer, spikes in zip((online, plain), fired):
        for module in trainer.net.modules():
            if module is trainer.net or isinstance(module, Block):
                module.register_forward_hook(lambda *given, spikes=spikes: spikes.append(given[-1].detach()))
    for iteration in range(3):
        iterate(online, iteration), iterate(plain, iteration)
    for actual, expected in zip(*fired):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # a spike more or less is 1
    assert oracle.relative_error(oracle.gradients(online.net), oracle.gradients(plain.net)) < 1e-5


def test_gradient_of_the_oracle():
    net = Net()
    reference = copy.deepcopy(net)
    expected = oracle.sltt_gradients(reference, [X] * T, TARGET, F.cross_entropy)
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, compile=True, **PLAN)
    for _ in range(2):
        net.zero_grad()
        online.forward_backward(X, TARGET)
    assert graphs() > 0
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-5


@pytest.mark.slow
def test_gradient_through_norms_that_are_taken_apart(monkeypatch):
    """In float64, where no potential is as near to the threshold as another algorithm rounds."""
    monkeypatch.setattr(blocks, "_BACKEND", "aot_eager_decomp_partition")
    net = Net().double().train()
    x = X.double()
    expected = oracle.sltt_gradients(net, [x] * T, TARGET, F.cross_entropy)
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, compile=True, **PLAN)
    for _ in range(2):
        net.zero_grad()
        online.forward_backward(x, TARGET)
    assert graphs() > 0
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-9


def test_equal_blocks_are_compiled_once():
    online, _ = pair(Net())
    for iteration in range(3):
        iterate(online, iteration)
    assert graphs() == 2  # the block's, and that of the first neuron, which is in none


class Doubled(nn.Module):
    """A parametrisation that is the same at every step."""

    sltt_time_invariant = True
    evaluated = 0

    def forward(self, weight):
        Doubled.evaluated += 1
        return 2 * weight


class Stem(layer.Conv2d):
    sltt_time_invariant = True
    evaluated = 0

    def forward(self, x):
        Stem.evaluated += 1
        return super().forward(x)


def test_what_does_not_depend_on_time_is_evaluated_once():
    net = Net()
    net.stem.__class__ = Stem
    net = nn.Sequential(net.stem, net.sn, net.body, net.head)
    for block in net[2]:
        nn.utils.parametrize.register_parametrization(block.conv, "weight", Doubled())
    online, plain = pair(net)
    for iteration in range(3):
        Doubled.evaluated = Stem.evaluated = 0
        result = iterate(online, iteration)
        evaluated = Doubled.evaluated, Stem.evaluated
        assert torch.equal(result.output, iterate(plain, iteration).output)
        if iteration:
            assert evaluated == (3, 1)
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(plain.net)) < 1e-6
    assert graphs() == 2


def test_the_network_stays_as_it_is():
    net = Net(parametrised=True)
    before = [(type(module), set(vars(module))) for module in net.modules()]
    online, _ = pair(net)
    classes = [type(module) for module in net.modules()]
    for iteration in range(3):
        iterate(online, iteration)
    assert [type(module) for module in net.modules()] == classes
    assert all("forward" not in vars(module) for module in net.modules())
    assert net.body[0].conv.weight.grad_fn is not None
    pickle.loads(pickle.dumps(copy.deepcopy(net.stem)))
    sltt_ext.revert(net)
    assert [cls for cls, _ in before] == [type(module) for module in net.modules()]


class Unfit(nn.Module):
    """Reads a value back, which no graph holds."""

    def forward(self, x):
        return x * 2 if float(x.sum()) > 0 else x


def test_convolutions_on_the_cpu_keep_the_layout_that_they_have(monkeypatch):
    options = []
    monkeypatch.setattr(blocks, "_BACKEND", "inductor")
    monkeypatch.setattr(torch, "compile", lambda function, **how: options.append(how["options"]) or function)
    code = blocks.CompiledCode(True)
    for device in ("cpu", "meta"):
        code.function([nn.Conv2d(1, 1, 3, device=device)])
        code.function([nn.Conv2d(2, 2, 3, device=device), neuron.LIFNode()])
    assert options == 2 * [{"layout_optimization": False}] + 2 * [None]


def test_a_network_that_cannot_be_compiled():
    net = networks.conv_net()
    net.insert(2, Unfit())
    online, _ = pair(net)
    iterate(online, 0)
    kept = [gradient.clone() for gradient in oracle.gradients(net)]
    with pytest.raises(CompilationError, match="cannot be compiled"):
        iterate(online, 1)
    assert all(map(torch.equal, kept, oracle.gradients(net)))
    assert all("forward" not in vars(module) for module in net.modules())


def test_a_network_that_cannot_be_compiled_runs_as_it_is():
    net = networks.conv_net()
    net.insert(2, Unfit())
    net = sltt_ext.convert(net)
    plain = sltt_ext.OnlineTrainer(copy.deepcopy(net), F.cross_entropy, T, **PLAN)
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, compile="try", **PLAN)
    iterate(online, 0)
    with pytest.warns(SLTTWarning, match="cannot be compiled"):
        iterate(online, 1)
    iterate(online, 2)
    for iteration in range(3):
        iterate(plain, iteration)
    assert all(map(torch.equal, oracle.gradients(net), oracle.gradients(plain.net)))


@pytest.mark.slow
def test_multi_step_of_snntorch():
    online, plain = pair(MultiStep(sltt_ext.convert(leaky_net())), chunk=T)
    for iteration in range(3):
        results = [iterate(trainer, iteration).output for trainer in (online, plain)]
        assert torch.equal(*results)
    assert graphs() > 0
    assert oracle.relative_error(oracle.gradients(online.net), oracle.gradients(plain.net)) < 1e-6


@pytest.mark.parametrize("value", ["yes", 1.5])
def test_other_values_are_refused(value):
    with pytest.raises(ConfigurationError, match="compile must be"):
        sltt_ext.OnlineTrainer(sltt_ext.convert(networks.conv_net()), F.cross_entropy, T, compile=value)


def test_an_iteration_is_planned_before_anything_is_compiled():
    """Only who asks for it by chunk="auto" has iterations measured, in which nothing is compiled."""
    net = sltt_ext.convert(networks.conv_net(step_mode="m"))
    assert sltt_ext.OnlineTrainer(net, F.cross_entropy, T, compile=True).chunk == 1
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, chunk="auto", compile=True)
    iterate(online, 0)
    while not online.plan.is_decided:
        assert graphs() == 0
        iterate(online, 1)
    for _ in range(3):
        iterate(online, 2)
    assert graphs() > 0
