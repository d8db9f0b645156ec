"""Declared steps compiled, against the class's own loop with its carried state detached."""

import copy
import sys

import pytest
import torch
from declared_neurons import Attributes, AttributesByStep, HardReset, Loop, fire
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import ActivationMeter
from sltt_ext.errors import BackendError, ConfigurationError
from sltt_ext.kernels import inductor

T, N = 4, 5
WIDTH = 0.7


class Clipped(torch.autograd.Function):
    """A surrogate with an argument, whose gradient is not linear in what arrives."""

    @staticmethod
    def forward(ctx, u, width):
        ctx.save_for_backward(u)
        ctx.width = width
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-0.5, 0.5) * (ctx.saved_tensors[0].abs() < ctx.width), None


class Channels(Loop):
    """A leak for each channel, a threshold in a buffer, numbers that are divided by, and a read-out beside the spikes."""

    states = 2

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(0.2, 0.8, 3))
        self.act, self.tau = nn.ReLU(), 1.7
        self.register_buffer("threshold", torch.tensor(0.4))

    def one(self, x, mem, trace):
        decay = self.decay.view(1, -1, *[1] * (x.dim() - 2))
        mem = x / self.tau if mem is None else decay * mem + (x - 0.1 * trace) / self.tau
        spike = Clipped.apply(mem - self.threshold, WIDTH)
        return (spike, mem), torch.where(spike > 0, torch.zeros_like(mem), mem), self.act(mem)


def channels(module, x, mem, trace):
    return Channels.one(module, x, mem, trace)


def one_state(module, x, mem):
    return HardReset.one(module, x, mem)


def neuron(cls=Channels, step=channels, time_dim=0, **options):
    """A class of its own, declared with ``step``, and so compiled on its own."""

    class Mine(cls):
        pass

    Mine.time_dim = time_dim
    sltt_ext.declare_neuron(Mine, time_dim=time_dim, **options)(step)
    return Mine


def gradients(module, x, weight):
    x = x.detach().requires_grad_()  # as it lies in memory
    outputs = module(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((output * weight * (1 + place)).sum() for place, output in enumerate(outputs)).backward()
    found = [x.grad, *(parameter.grad for parameter in module.parameters())]
    module.zero_grad()
    return outputs, found


def compare(original, converted, x):
    original.detached, weight = True, torch.randn(x.shape)
    expected, wanted = gradients(original, x, weight)
    outputs, got = gradients(converted, x, weight)
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


@pytest.mark.slow
def test_outputs_and_gradients():
    """Of channels, times behind the batch, and other sizes and layouts; what the step reads is not taken for granted."""
    cls = neuron(spikes=0)
    original, converted = cls(), sltt_ext.convert(cls(), backend="inductor")
    x = 2 * torch.randn(T, N, 3, 5, 7)
    compare(original, converted, x)
    before = len(inductor._COMPILED)
    compare(original, converted, 2 * torch.randn(T, N + 2, 3, 4, 6))
    assert len(inductor._COMPILED) == before > 0
    layout = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (T, N))
    compare(original, converted, layout)
    compare(original, converted, x[:, :1])
    for module in (original, converted):
        module.tau = 1.3
        module.threshold.fill_(0.6)
    compare(original, converted, x)


@pytest.mark.slow
def test_a_global_that_changes(monkeypatch):
    """It is read by a method of the neuron, which the step calls."""
    cls, x = neuron(), torch.randn(T, N, 3)
    original, converted = cls(), sltt_ext.convert(cls(), backend="inductor")
    for width in (0.7, 0.1):
        monkeypatch.setattr(sys.modules[__name__], "WIDTH", width)
        compare(original, converted, x)


@pytest.mark.slow
def test_time_behind_the_batch():
    cls = neuron(HardReset, one_state, time_dim=1)
    compare(cls(), sltt_ext.convert(cls(), backend="inductor"), 2 * torch.randn(N, T, 11))


class Net(nn.Module):
    def __init__(self, cls):
        super().__init__()
        torch.manual_seed(3)
        self.fc1, self.lif1, self.fc2, self.lif2 = nn.Linear(6, 8), cls(), nn.Linear(8, 7), cls()
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.lif2(self.fc2(self.lif1(2 * self.fc1(x)))))


@pytest.mark.slow
def test_training():
    """Single steps, chunks, SLTT-K and packed spikes by the trainer, `over_time`, and `convert` alone."""
    cls = neuron(HardReset, one_state, spikes=0)
    x_seq, target = torch.randn(T, N, 6), torch.randint(3, (N,))

    def wanted(steps):
        original = Net(cls)
        original.lif1.detached = original.lif2.detached = True
        outputs = original(x_seq)
        (sum(F.cross_entropy(outputs[t], target) for t in steps) / len(steps)).backward()
        return original

    def check(converted, steps=range(T)):
        for (name, a), b in zip(converted.named_parameters(), wanted(steps).parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7), name
        converted.zero_grad()

    converted = sltt_ext.convert(Net(cls), backend="inductor")
    for options in ({"chunk": 1, "pack_spikes": True}, {"chunk": 2}, {"schedule": lambda *_: (1, 3)}):
        online = sltt_ext.OnlineTrainer(converted, F.cross_entropy, T, time_dim=0, **options)
        online.forward_backward(x_seq, target)
        check(converted, (1, 3) if "schedule" in options else range(T))
    (sum(F.cross_entropy(output, target) for output in converted(x_seq)) / T).backward()
    check(converted)
    sltt_ext.over_time(converted, time_dim=0, returns="sequence")
    (sum(F.cross_entropy(output, target) for output in converted(x_seq)) / T).backward()
    check(converted)
    assert any(program[0].name == "Mine" for program in inductor._COMPILED if hasattr(program[0], "name"))


@pytest.mark.slow
def test_one_step_a_call():
    """The states are read as attributes, and one of them is the output; only the first is a number."""
    modules = [AttributesByStep(), sltt_ext.convert(AttributesByStep(), backend="inductor")]
    modules[0].register_forward_pre_hook(
        lambda module, _: vars(module).update(
            {name: torch.as_tensor(getattr(module, name)).detach() for name in ("mem", "spike")}
        )
    )
    x_seq, weight, results = 2 * torch.randn(T, N, 3), torch.rand(T, N, 3), []
    for module in modules:
        x = x_seq.clone().requires_grad_()
        spikes = [module(one) for one in x]
        (
            sum((a * b).sum() for a, b in zip(spikes, weight)) + (module.mem.sin() + 2 * module.spike).sum()
        ).backward()
        results.append([*spikes, module.mem, module.spike, x.grad, module.decay.grad])
    assert modules[1].spike is results[1][T - 1]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_nothing_is_kept_but_the_input():
    cls = neuron(HardReset, one_state)
    converted = sltt_ext.convert(cls(), backend="inductor")
    x = torch.randn(T, N, 300, requires_grad=True)
    converted(x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        converted(x)
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() > 1} == {x.data_ptr()}


@pytest.mark.slow
def test_a_gradient_of_gradients_is_refused():
    cls = neuron(HardReset, one_state)
    x = torch.randn(T, N, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(sltt_ext.convert(cls(), backend="inductor")(x).sum(), x, create_graph=True)
    with pytest.raises(ConfigurationError, match="cannot be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("look", [ActivationMeter, torch.no_grad])
def test_auto_never_compiles(look):
    """Nor does "inductor" where a mode looks at the operators."""
    cls, x = neuron(HardReset, one_state), torch.randn(T, N, 3)
    before = len(inductor._COMPILED)
    backend = "inductor" if look is ActivationMeter else "auto"
    converted = sltt_ext.convert(cls(), backend=backend)
    with look():
        assert torch.equal(converted(x), HardReset()(x))
    assert len(inductor._COMPILED) == before


LEAK = torch.tensor(0.5)


class OutOfSight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        return torch.from_numpy((u.detach().numpy() >= 0).astype("float32"))

    @staticmethod
    def backward(ctx, grad):
        return grad


def plain(x, mem):
    return x if mem is None else 0.5 * mem + x


def inhibits(module, x, mem):
    mem = plain(x, mem)
    return fire(mem - mem.mean(-1, keepdim=True)), mem


def shifts(module, x, mem):
    mem = plain(x, mem)
    return fire(mem - 1), mem.roll(1, -1)


def is_noisy(module, x, mem):
    mem = plain(x, mem)
    return fire(mem - 1) + 0 * torch.rand_like(mem), mem


def branches(module, x, mem):
    mem = plain(x, mem)
    return fire(mem - (1 if mem.max() > -1e9 else 0)), mem


def leaves_torch(module, x, mem):
    mem = plain(x, mem)
    return OutOfSight.apply(mem - 1), mem


def has_one_shape(module, x, mem):
    mem = plain(x, torch.zeros(x.shape) if mem is None else mem)
    return fire(mem - 1), mem


def reads_a_global(module, x, mem):
    mem = x if mem is None else LEAK * mem + x
    return fire(mem - 1), mem


def counts(module, x, mem):
    module.steps = getattr(module, "steps", 0) + 1
    mem = plain(x, mem)
    return fire(mem - 1), mem


def writes_to_its_input(module, x, mem):
    mem = plain(x, mem)
    mem.data.mul_(1.0)
    return fire(mem - 1), mem


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (inhibits, r"not element-wise \(aten.mean"),
        (shifts, r"not element-wise \(aten.roll"),
        (is_noisy, r"not element-wise \(aten.rand_like"),
        (has_one_shape, r"makes a tensor of one shape .*torch.zeros_like\(x\)"),
        (writes_to_its_input, r"writes into what it is given \(aten.mul_"),
        (counts, "writes to steps of the module"),
        (branches, "data-dependent"),
        (leaves_torch, "numpy"),
        (reads_a_global, "Found in aten.mul.*the tensors of the module"),
    ],
)
def test_steps_that_no_loop_over_elements_is(step, says):
    """Each an error that names class and cure, as long as it is compiled, and none without."""

    class Own(Loop):
        states = 1

        def __init__(self):
            super().__init__()
            del self.decay

        def one(self, x, mem):
            return step(self, x, mem)

    cls, x = neuron(Own, step), torch.randn(T, N, 3)
    converted = sltt_ext.convert(cls(), backend="inductor")
    for _ in range(2):
        with pytest.raises(BackendError, match=f"the step of Mine.*{says}") as raised:
            converted(x)
        assert "backend='torch' runs the step as it is" in str(raised.value)
    assert torch.equal(sltt_ext.convert(copy.deepcopy(converted), backend="torch")(x), cls()(x))


def test_names_of_states_need_no_compiler():
    """Its own forward runs, whatever the backend is."""
    before = len(inductor._COMPILED)
    sltt_ext.convert(Attributes(), backend="inductor")(torch.randn(N, 3))
    assert len(inductor._COMPILED) == before
