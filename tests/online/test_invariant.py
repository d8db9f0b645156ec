"""Time-invariant modules are evaluated once an iteration: same gradients, statistics and outputs as without."""

import copy
import gc

import networks
import oracle
import products
import pytest
import torch
import torch.utils.checkpoint
from invariant_networks import CALLS, STEMS, Counting, Net, Standardised, T
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import sltt_ext
from sltt_ext import models
from sltt_ext.analysis import ActivationMeter, peak_activation_bytes
from sltt_ext.errors import LossError


def trainer(*args, **options):
    """Evaluates once, and plans nothing."""
    plain = {"chunk": 1, "pack_spikes": False, "cache_invariant": True}
    return sltt_ext.OnlineTrainer(*args, **plain | options)


def run(net, x, iterations=3, **options):
    """Gradients, buffers and outputs of some iterations, and of a prediction."""
    online = trainer(sltt_ext.convert(net), F.cross_entropy, T, **options)
    outputs = [online.forward_backward(x, torch.tensor([0, 2, 1])).output for _ in range(iterations)]
    outputs.append(online.predict(x))
    return [*oracle.gradients(net), *outputs, *(buffer.double() for buffer in net.buffers())]


def both(net, x, step_mode, **options):
    functional.set_step_mode(net, step_mode)
    results = []
    for cache_invariant in (True, False):
        torch.manual_seed(1)
        results.append(run(copy.deepcopy(net), x, cache_invariant=cache_invariant, **options))
    return results


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("autocast", "packed"),
    [(False, False), (True, False), (False, True)],
    ids=["float32", "bfloat16", "packed"],
)
def test_nothing_stays_behind(options, autocast, packed):
    """Nothing waits for the garbage collector either."""
    step_mode, options = options
    net = Net(layer.Conv2d(2, 4, 3, padding=1), layer.BatchNorm2d(4), weight_norm(layer.Conv2d(4, 4, 1)))
    functional.set_step_mode(net, step_mode)
    online = trainer(sltt_ext.convert(net), F.cross_entropy, T, pack_spikes=packed, **options)
    x, living = torch.randn(3, 2, 6, 6), []
    gc.disable()
    try:
        with ActivationMeter() as meter, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(5):
                net.zero_grad()
                online.forward_backward(x, torch.tensor([0, 2, 1]))
                living.append(meter.live_bytes)
    finally:
        gc.enable()
    assert living[2:] == [living[2]] * 3


@pytest.mark.parametrize(("stem", "call"), products.spread(STEMS, CALLS, each=3))
def test_nothing_changes_but_the_work(stem, call):
    step_mode, options = CALLS[call]
    cached, plain = both(Net(*STEMS[stem]()), torch.randn(3, 2, 6, 6), step_mode, **options)
    assert [value is None for value in cached] == [value is None for value in plain]
    assert oracle.relative_error(cached, plain) < 1e-6


def test_evaluated_once_from_the_second_iteration_on():
    module = Counting(invariant=True)
    online = trainer(sltt_ext.convert(Net(layer.Conv2d(2, 4, 3), module)), F.cross_entropy, T)
    x, target = torch.randn(3, 2, 6, 6), torch.tensor([0, 2, 1])
    for evaluations in (T, 1, 1):
        module.calls = 0
        online.forward_backward(x, target)
        assert module.calls == evaluations
    module.calls = 0
    online.predict(x)
    assert module.calls == 1


def test_what_was_watched_in_predictions_only_is_watched_again_in_training():
    module = Counting(invariant=True)
    online = trainer(sltt_ext.convert(Net(layer.Conv2d(2, 4, 3), module)), F.cross_entropy, T)
    x, target = torch.randn(3, 2, 6, 6), torch.tensor([0, 2, 1])
    for run_once, evaluations in [
        (lambda: online.predict(x), T),
        (lambda: online.predict(x), 1),
        (lambda: online.forward_backward(x, target), T),
        (lambda: online.forward_backward(x, target), 1),
    ]:
        module.calls = 0
        run_once()
        assert module.calls == evaluations


@pytest.mark.parametrize(
    "options",
    [
        {"cache_invariant": False},
        {"on_step": lambda t: None},
        {"time_dim": 0},
        {"chunk": 1, "loss_fn": lambda output, target: output.sum()},
    ],
    ids=["off", "updates", "sequence", "undeclared"],
)
def test_evaluated_at_every_step(options):
    module = Counting(invariant=None if "loss_fn" in options else True)
    loss_fn = options.pop("loss_fn", F.cross_entropy)
    online = trainer(sltt_ext.convert(Net(layer.Conv2d(2, 4, 3), module)), loss_fn, T, **options)
    x = torch.randn(T, 3, 2, 6, 6) if "time_dim" in options else torch.randn(3, 2, 6, 6)
    online.forward_backward(x, torch.tensor([0, 2, 1]))
    assert module.calls == T


def test_a_resumed_run_evaluates_the_same_modules_once():
    """So that it goes on to the last bit as it would have without an interruption."""
    net = sltt_ext.convert(
        Net(layer.Conv2d(2, 4, 3, padding=1), Counting(invariant=True), layer.AvgPool2d(2), nn.Tanh())
    )
    x, target = torch.ones(3, 2, 6, 6).cumsum(-1).sin(), torch.tensor([0, 2, 1])
    online = trainer(net, F.cross_entropy, T)
    online.forward_backward(x, target)
    found = []
    for saved in (online.state_dict(), None):
        if saved is not None:
            resumed = trainer(net, F.cross_entropy, T)
            resumed.load_state_dict(saved)
        net.zero_grad()
        net.stem[1].calls = 0
        (online if saved is None else resumed).forward_backward(x, target)
        assert net.stem[1].calls == 1
        found.append([gradient.clone() for gradient in oracle.gradients(net)])
    assert all(map(torch.equal, *found))


def test_parametrisations_of_any_layer_too():
    calls = []

    class Watched(Standardised):
        def forward(self, weight):
            calls.append(None)
            return super().forward(weight)

    net = Net(layer.Conv2d(2, 4, 3, padding=1))
    parametrize.register_parametrization(net.classify, "weight", Watched())
    online = trainer(sltt_ext.convert(net), F.cross_entropy, T, time_dim=0)
    for evaluations in (T, 1):
        calls.clear()
        online.forward_backward(torch.randn(T, 3, 2, 6, 6), torch.tensor([0, 2, 1]))
        assert len(calls) == evaluations


REAL = {
    "nf_resnet34": (models.nf_resnet34, (2, 3, 32, 32)),
    "preact_resnet18": (models.preact_resnet18, (2, 3, 32, 32)),
    "vgg11_bn": (models.vgg11_bn, (2, 2, 32, 32)),
    "spiking_resnet18": (lambda num_classes, **_: networks.resnet18(), (2, 3, 32, 32)),
}


@pytest.mark.parametrize(
    ("options", "pack_spikes"),
    [({}, False), ({"k": 1}, True), ({"chunk": 2}, True)],
    ids=["SLTT", "SLTT-1, packed", "chunks, packed"],
)
@pytest.mark.parametrize(("make", "shape"), REAL.values(), ids=REAL)
def test_real_networks(make, shape, options, pack_spikes):
    torch.manual_seed(0)
    net = make(10, width=8)
    for name, parameter in net.named_parameters():
        if name.endswith("gain") or name.startswith(("fc", "linear", "classifier")):
            nn.init.normal_(parameter, 1.0 if name.endswith("gain") else 0.0, 0.1)
    functional.set_step_mode(net, "m" if "chunk" in options else "s")
    x = 3 * torch.rand(shape)

    def gradients(**switches):
        trained = sltt_ext.convert(copy.deepcopy(net))
        generator = torch.Generator().manual_seed(1)
        online = trainer(trained, F.cross_entropy, T, generator=generator, **options, **switches)
        for _ in range(3):
            trained.zero_grad()
            online.forward_backward(x, torch.tensor([3, 7]))
        return [*oracle.gradients(trained), *(buffer.double() for buffer in trained.buffers())]

    actual, expected = gradients(pack_spikes=pack_spikes), gradients(cache_invariant=False)
    assert oracle.relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize(
    ("multi_step", "options", "watched"),
    [
        (False, {}, T),
        (True, {}, T),
        (True, {"chunk": 3}, 2 + 1),  # and once for a single step, to compare with
        (True, {"chunk": T}, 1 + 1),
        (True, {"schedule": lambda T, generator: [2]}, T),
    ],
    ids=["steps", "multi-step", "chunks", "sequence", "SLTT-1"],
)
@pytest.mark.parametrize("training", [True, False])
def test_snntorch(multi_step, options, watched, training):
    snntorch = pytest.importorskip("snntorch")

    def run_once(cache_invariant):
        torch.manual_seed(0)
        calls = Counting(invariant=True)
        net = sltt_ext.convert(
            nn.Sequential(
                nn.Conv2d(1, 4, 3),
                calls,
                nn.BatchNorm2d(4).train(training),
                snntorch.Leaky(beta=0.9, init_hidden=True),
                nn.Flatten(),
                weight_norm(nn.Linear(144, 3)),
                snntorch.Leaky(beta=0.8, init_hidden=True, output=True),
            )
        )
        if multi_step:
            net = sltt_ext.snntorch.MultiStep(net)
        found = run(
            net, torch.rand(3, 1, 8, 8), output="membrane", cache_invariant=cache_invariant,
            pack_spikes=cache_invariant, **options,
        )  # fmt: skip
        return found, calls.calls

    (cached, few), (plain, many) = run_once(True), run_once(False)
    assert few == watched + 3  # two iterations and a prediction
    assert many > few or options == {"chunk": T}
    assert oracle.relative_error(cached, plain) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The steps' gradients add up in float32: caching is no less exact than not caching, by one more rounding at most."""

    def gradients(cache_invariant, lower=None):
        torch.manual_seed(0)
        net = Net(weight_norm(layer.Conv2d(2, 4, 3, padding=1)), layer.AvgPool2d(2))
        online = trainer(sltt_ext.convert(net), F.cross_entropy, T, cache_invariant=cache_invariant)
        for _ in range(2):
            net.zero_grad()
            with torch.autocast("cpu", lower or torch.bfloat16, enabled=lower is not None):
                online.forward_backward(3 * torch.ones(3, 2, 6, 6).cumsum(-1).sin(), torch.tensor([0, 2, 1]))
        return oracle.gradients(net)

    cached, plain = gradients(True, dtype), gradients(False, dtype)
    assert oracle.relative_error(cached, plain) < 2 * torch.finfo(dtype).eps


def test_checkpointed_stem():
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    stem = nn.Sequential(layer.Conv2d(2, 4, 3, padding=1), nn.Tanh(), layer.Conv2d(4, 4, 3, padding=1))
    found = []
    for module in (Checkpointed(copy.deepcopy(stem)), stem):
        torch.manual_seed(1)
        found.append(run(Net(module), torch.randn(3, 2, 6, 6)))
    assert oracle.relative_error(*found) < 1e-6


def test_compiled_networks_are_left_alone():
    net = sltt_ext.convert(Net(layer.Conv2d(2, 4, 3, padding=1)))
    x = torch.randn(3, 2, 6, 6)
    expected = run(copy.deepcopy(net), x)
    actual = run(torch.compile(net, backend="eager"), x)
    assert oracle.relative_error(actual, expected) < 1e-6
    assert not any("forward" in vars(module) for module in net.modules())


class Fading(Net):
    """Changes the input itself, in place, after its stem has read it."""

    def forward(self, x):
        y = self.stem[0](x)
        x.mul_(0.5)
        return self.classify(self.flatten(self.pool(self.second(self.neuron(y)))))


@pytest.mark.parametrize(("step_mode", "options"), [("s", {}), ("m", {"chunk": 1})])
def test_an_input_that_the_network_changes(step_mode, options):
    torch.manual_seed(0)
    net = Fading(layer.Conv2d(2, 4, 3).requires_grad_(False))
    functional.set_step_mode(net, step_mode)
    x = torch.randn(3, 2, 6, 6)
    cached, plain = (
        run(copy.deepcopy(net), x.clone(), cache_invariant=cache_invariant, **options)
        for cache_invariant in (True, False)
    )
    assert oracle.relative_error(cached, plain) < 1e-6


class Changing(Net):
    """Changes its stem's output in place, but not in the first iteration."""

    iteration = 0

    def forward(self, x):
        x = self.stem[0](x)
        if self.iteration:
            with torch.no_grad():
                x.mul_(2)
        return self.flatten(self.pool(self.second(self.neuron(x))))


def test_a_change_in_place_is_found_out():
    net = sltt_ext.convert(Changing(layer.Conv2d(2, 4, 3)))
    online = trainer(net, F.cross_entropy, T)
    x, target = torch.randn(3, 2, 6, 6), torch.tensor([0, 2, 1])
    online.forward_backward(x, target)
    net.iteration = 1
    with pytest.raises(LossError, match="changes the output of a module in place"):
        online.forward_backward(x, target)
    assert not any("forward" in vars(module) for module in net.modules())


class Clamping(Net):
    """Changes its weights in place, before every step."""

    def forward(self, x):
        with torch.no_grad():
            self.conv.parametrizations.weight.original0.mul_(0.9)
        return super().forward(x)


@pytest.mark.parametrize("options", [{}, {"schedule": lambda T, generator: [2]}], ids=["SLTT", "SLTT-1"])
def test_weights_that_change_between_steps(options):
    torch.manual_seed(0)
    net, x = Clamping(layer.Conv2d(2, 4, 3, padding=1)), torch.randn(3, 2, 6, 6)
    cached, plain = both(net, x, "s", **options)
    assert oracle.relative_error(cached, plain) < 1e-6


class ClampingLater(Clamping):
    """Does so when nobody watches any more."""

    iteration = 0

    def forward(self, x):
        return super().forward(x) if self.iteration else Net.forward(self, x)


def test_weights_that_begin_to_change_later():
    net, x = ClampingLater(layer.Conv2d(2, 4, 3, padding=1)), torch.randn(3, 2, 6, 6)
    online = trainer(sltt_ext.convert(net), F.cross_entropy, T)
    online.forward_backward(x, torch.tensor([0, 2, 1]))
    net.iteration = 1
    with pytest.raises(LossError, match="the weights of ParametrizationList in place"):
        online.forward_backward(x, torch.tensor([0, 2, 1]))


class Early(Net):
    """Reads a second stem in the first steps only."""

    def __init__(self, *stem, chained):
        super().__init__(*stem)
        self.chained = chained
        self.calls = 0

    def forward(self, x):
        first, second = self.stem
        y = first(x)
        if self.calls % T < T - 1:
            y = y + second(y if self.chained else x)
        elif not self.chained:
            y = y * 1.0
        self.calls += 1
        return self.flatten(self.pool(self.second(self.neuron(y))))


def early(chained, **options):
    torch.manual_seed(0)
    channels = 4 if chained else 2
    net = Early(layer.Conv2d(2, 4, 3, padding=1), layer.Conv2d(channels, 4, 1), chained=chained)
    online = trainer(sltt_ext.convert(net), F.cross_entropy, T, **options)
    for _ in range(2):
        net.zero_grad()
        online.forward_backward(torch.rand(3, 2, 6, 6), torch.tensor([0, 2, 1]))
    return [gradient for gradient in oracle.gradients(net) if gradient is not None]


@pytest.mark.parametrize("chained", [False, True])
def test_what_the_last_step_does_not_read_is_back_propagated_all_the_same(chained):
    assert oracle.relative_error(early(chained), early(chained, cache_invariant=False)) < 1e-6


def test_kept_graphs_do_not_raise_the_peak():
    """Peak memory of SLTT-1 is that without caching; with all steps there is one more gradient of each weight."""
    net = sltt_ext.convert(Net(layer.Conv2d(2, 4, 3, padding=1)))
    net.classify = weight_norm(nn.Linear(4, 4000))
    x, target = torch.randn(3, 2, 6, 6), torch.tensor([0, 2, 1])

    def peak(cache_invariant, **options):
        online = trainer(net, F.cross_entropy, T, cache_invariant=cache_invariant, **options)
        for _ in range(2):
            net.zero_grad()
            peak = peak_activation_bytes(lambda: online.forward_backward(x, target), net)
        return peak

    last = {"schedule": lambda T, generator: [T - 1]}
    assert peak(True, **last) < peak(False, **last) + 0.5 * net.classify.weight.nbytes
    assert peak(True) < peak(False) + 1.5 * net.classify.weight.nbytes


def test_kept_graphs_are_freed_layer_by_layer():
    """The gradients of parametrised weights do not pile up until the last step's backward pass is over."""
    layers = [
        nn.Sequential(weight_norm(nn.Linear(300, 300)), neuron.LIFNode(v_threshold=0.3)) for _ in range(6)
    ]
    net = sltt_ext.convert(nn.Sequential(*layers))
    x, target = torch.rand(3, 300), torch.tensor([0, 2, 1])

    def peak(cache_invariant):
        online = trainer(net, F.cross_entropy, T, k=1, cache_invariant=cache_invariant)
        online.forward_backward(x, target)  # watched
        net.zero_grad()
        return peak_activation_bytes(lambda: online.forward_backward(x, target), net)

    assert peak(True) < peak(False) + 2.5 * layers[0][0].weight.nbytes
