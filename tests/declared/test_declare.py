"""Neurons of no framework, against their own loops with the carried state detached."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.conversion import _RULES
from sltt_ext.declared.adapters import Declared
from sltt_ext.errors import ConfigurationError, ConversionError, DeclarationError
from sltt_ext.surrogate import Surrogate


class Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].abs()).clamp_min(0)


fire = Triangle.apply


class Loop(nn.Module):
    """Its own loop over time; ``detached`` makes it the oracle."""

    time_dim = 0
    detached = False

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.6))

    def forward(self, x):
        state, outputs = None, []
        for step in x.unbind(self.time_dim):
            if self.detached and state is not None:
                state = tuple(tensor.detach() for tensor in state)
            output, *state = self.one(step, *(state or [None] * self.states))
            outputs.append(output)
        if isinstance(outputs[0], tuple):
            return tuple(torch.stack(each, self.time_dim) for each in zip(*outputs))
        return torch.stack(outputs, self.time_dim)


class HardReset(Loop):
    states = 1

    def one(self, x, mem):
        mem = x if mem is None else self.decay * mem + x
        spike = fire(mem - 1.0)
        return spike, mem * (1 - spike)


class BatchFirst(HardReset):
    time_dim = 1


class LastSpikeResets(Loop):
    """As the networks with membrane shortcuts have it: the spike is a state, too."""

    states = 2

    def one(self, x, mem, spike):
        mem = x if mem is None else mem * self.decay * (1 - spike.detach()) + x
        spike = fire(mem - 0.5)
        return spike, mem, spike


class WithPotential(Loop):
    states = 1

    def one(self, x, mem):
        mem = x if mem is None else self.decay * mem + x
        spike = fire(mem - 1.0)
        return (spike, mem), mem - spike


class Attributes(nn.Module):
    """One step a call, the state in attributes."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.6))
        self.mem, self.spike = 0.0, 0.0

    def forward(self, x):
        self.mem = self.mem * self.decay * (1 - self.spike) + x
        self.spike = fire(self.mem - 0.5)
        return self.spike


class AttributesByStep(Attributes):
    pass


class FixedDecay(Attributes):
    """One step a call, a leak of 0.75, and a potential that is reset at once."""

    def __init__(self):
        super().__init__()
        del self.decay
        self.decay, self.mem = 0.75, None

    def forward(self, x):
        mem = x if self.mem is None else self.decay * self.mem + x
        spike = fire(mem - 1.0)
        self.mem = mem - spike
        return spike


class FixedLoop(HardReset):
    def __init__(self):
        super().__init__()
        del self.decay
        self.decay = 0.75


@pytest.fixture(autouse=True)
def declared():
    """The declarations below, and none that another test has made."""
    rules, declarations = dict(_RULES), dict(Declared.declarations)

    for cls in (HardReset, BatchFirst):

        @sltt_ext.declare_neuron(cls, time_dim=cls.time_dim, spikes=0)
        def one_state(module, x, mem):
            mem = x if mem is None else module.decay * mem + x
            spike = fire(mem - 1.0)
            return spike, mem * (1 - spike)

    @sltt_ext.declare_neuron(LastSpikeResets, time_dim=0, spikes=0)
    def two_states(module, x, mem, spike):
        mem = x if mem is None else mem * module.decay * (1 - spike.detach()) + x
        spike = fire(mem - 0.5)
        return spike, mem, spike

    @sltt_ext.declare_neuron(WithPotential, time_dim=0, spikes=0)
    def two_outputs(module, x, mem):
        mem = x if mem is None else module.decay * mem + x
        spike = fire(mem - 1.0)
        return (spike, mem), mem - spike

    sltt_ext.declare_neuron(Attributes, state=("mem", "spike"), spikes=0)

    @sltt_ext.declare_neuron(AttributesByStep, spikes=0)
    def by_step(module, x, mem, spike):
        mem = mem * module.decay * (1 - spike) + x
        spike = fire(mem - 0.5)
        return spike, mem, spike

    triangle = Surrogate("piecewise_quadratic", (1.0,))
    sltt_ext.declare_neuron(
        FixedDecay,
        state="mem",
        spikes=0,
        as_lif=lambda m: {
            "tau": 1 / (1 - m.decay),
            "factored_leak": True,
            "v_reset": None,
            "surrogate": triangle,
        },
    )
    sltt_ext.declare_neuron(
        FixedLoop,
        time_dim=0,
        spikes=0,
        as_lif=lambda m: {"tau": 1 / (1 - m.decay), "factored_leak": True, "surrogate": triangle},
    )
    yield
    _RULES.clear()
    _RULES.update(rules)
    Declared.declarations.clear()
    Declared.declarations.update(declarations)


SEQUENCES = [HardReset, BatchFirst, LastSpikeResets, WithPotential, FixedLoop]
STEPS = [Attributes, AttributesByStep, FixedDecay]
T, N = 5, 4


def outputs_of(net, x_seq):
    """What a neuron returns over ``x_seq`` ``[T, N, ...]``, first output, time in front."""
    if isinstance(net, Attributes):
        return torch.stack([net(x) for x in x_seq])
    output = net(x_seq.movedim(0, net.time_dim))
    return (output[0] if isinstance(output, tuple) else output).movedim(net.time_dim, 0)


def oracle_of(net):
    """The same, which detaches what it carries."""
    if isinstance(net, Attributes):

        def detach(module, _):
            for name in ("mem", "spike"):
                if isinstance(getattr(module, name), torch.Tensor):
                    setattr(module, name, getattr(module, name).detach())

        net.register_forward_pre_hook(detach)
    else:
        net.detached = True
    return net


def gradients(net, x_seq, weight):
    net.zero_grad()
    x_seq = x_seq.clone().requires_grad_()
    outputs = outputs_of(net, x_seq)
    (outputs * weight).sum().backward()
    return outputs.detach(), [x_seq.grad, *(parameter.grad for parameter in net.parameters())]


@pytest.mark.parametrize("cls", [*SEQUENCES, *STEPS])
def test_convert_alone(cls):
    x_seq, weight = 2 * torch.randn(T, N, 3), torch.rand(T, N, 3)
    expected, wanted = gradients(oracle_of(cls()), x_seq, weight)
    converted = sltt_ext.convert(cls())
    for _ in range(2):
        outputs, got = gradients(converted, x_seq, weight)
        assert torch.equal(outputs, expected)
        for a, b in zip(got, wanted):
            assert torch.allclose(a, b, rtol=0 if "Fixed" not in cls.__name__ else 1e-6, atol=0)
        sltt_ext.convert(converted).reset_state()
    assert issubclass(type(converted), cls)
    assert type(sltt_ext.revert(converted)) is cls


def test_bptt_is_something_else():
    """What is compared above differs from the gradient through time."""
    x_seq, weight = 2 * torch.randn(T, N, 3), torch.rand(T, N, 3)
    for cls in (*SEQUENCES, *STEPS):
        assert not torch.equal(
            gradients(cls(), x_seq, weight)[1][0], gradients(oracle_of(cls()), x_seq, weight)[1][0]
        )


class First(nn.Module):
    """A neuron that returns more than spikes, in a network that reads spikes."""

    def __init__(self, neuron):
        super().__init__()
        self.neuron = neuron

    def forward(self, x):
        output = self.neuron(x)
        return output[0] if isinstance(output, tuple) else output


def network(cls):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), First(cls()), nn.Linear(8, 7), First(cls()), nn.Linear(7, 3))


def trainers(cls):
    chunks = [1] if issubclass(cls, Attributes) else [1, 2, T]
    return [(chunk, packs) for chunk in chunks for packs in (False, True)]


@pytest.mark.parametrize("cls", [cls for cls in (*SEQUENCES, *STEPS) if cls is not BatchFirst])
def test_trainer(cls):
    x_seq, target = torch.randn(T, N, 6), torch.randint(3, (N,))
    original = network(cls)
    for module in original:
        if isinstance(module, First):
            oracle_of(module.neuron)
    steps = [original(x) for x in x_seq] if issubclass(cls, Attributes) else original(x_seq)
    (sum(F.cross_entropy(step, target) for step in steps) / T).backward()
    converted = sltt_ext.convert(network(cls))
    for chunk, packs in trainers(cls):
        converted.zero_grad()
        online = sltt_ext.OnlineTrainer(
            converted, F.cross_entropy, T, time_dim=0, chunk=chunk, pack_spikes=packs
        )
        output = online.forward_backward(x_seq, target).output
        for a, b in zip(converted.parameters(), original.parameters()):
            assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7)
        assert torch.allclose(output, sum(steps) / T, atol=1e-6)
        assert torch.allclose(online.predict(x_seq), output, atol=1e-6)


def test_k_steps_of_a_declared_neuron():
    x_seq, target = torch.randn(T, N, 6), torch.randint(3, (N,))
    original = network(HardReset)
    for module in original:
        if isinstance(module, First):
            oracle_of(module.neuron)
    outputs = original(x_seq)
    (F.cross_entropy(outputs[1], target) / 2 + F.cross_entropy(outputs[4], target) / 2).backward()
    converted = sltt_ext.convert(network(HardReset))
    sltt_ext.OnlineTrainer(
        converted, F.cross_entropy, T, time_dim=0, schedule=lambda *_: (1, 4)
    ).forward_backward(x_seq, target)
    for a, b in zip(converted.parameters(), original.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_spikes_are_packed():
    converted = sltt_ext.convert(network(HardReset))
    online = sltt_ext.OnlineTrainer(converted, F.cross_entropy, T, time_dim=0, pack_spikes=True)
    online.forward_backward(torch.randn(T, N, 6), torch.randint(3, (N,)))
    spikes = torch.ones(2, 2)
    assert converted[1].neuron.spikes(spikes)[0] is spikes
    assert sltt_ext.convert(WithPotential()).spikes((spikes, None))[0] is spikes


@pytest.mark.filterwarnings("ignore:the trainer calls the network for each time step")
def test_own_time_inside_one_step_of_the_trainer():
    """A network that shows each frame several times to itself starts each call from rest, as it does by itself."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.neuron = nn.Linear(6, 3), HardReset()

        def forward(self, x):
            return self.neuron(self.fc(x).repeat(4, 1, 1)).mean(0, keepdim=True)

    torch.manual_seed(1)
    original, converted = Inner(), None
    converted = sltt_ext.convert(copy.deepcopy(original))
    oracle_of(original.neuron)
    x_seq, target = torch.randn(T, N, 6), torch.randint(3, (N,))
    sltt_ext.OnlineTrainer(converted, F.cross_entropy, T, time_dim=0).forward_backward(x_seq, target)
    (sum(F.cross_entropy(original(x)[0], target) for x in x_seq) / T).backward()
    for a, b in zip(converted.parameters(), original.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_twice_in_a_step_is_an_error_of_the_trainer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.neuron = nn.Linear(6, 6), HardReset()

        def forward(self, x):
            return self.neuron(self.fc(self.neuron(self.fc(x))))

    torch.manual_seed(1)
    net, x_seq = Twice(), torch.randn(T, N, 6)
    own = oracle_of(copy.deepcopy(net).neuron)
    twin = copy.deepcopy(net)
    twin.neuron = own
    sltt_ext.convert(net)
    net(x_seq).sum().backward()
    twin(x_seq).sum().backward()
    assert torch.equal(net.fc.weight.grad, twin.fc.weight.grad)
    with pytest.raises(ConfigurationError, match="HardReset runs more than once in a step"):
        sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0).forward_backward(
            x_seq, torch.zeros(N).long()
        )


class OneStepAtATime(nn.Module):
    """Neurons with their time behind the batch, in a network that runs step by step."""

    def __init__(self, axis=True):
        super().__init__()
        self.fc, self.neuron, self.axis = nn.Linear(6, 3), BatchFirst(), axis

    def forward(self, x):
        return self.neuron(self.fc(x).unsqueeze(1)).squeeze(1) if self.axis else self.neuron(self.fc(x))


@pytest.mark.parametrize("batch", [4, T])
def test_time_behind_the_batch_in_the_trainer(batch):
    x_seq, target = torch.randn(T, batch, 6), torch.zeros(batch).long()
    torch.manual_seed(1)
    net = OneStepAtATime()
    own = oracle_of(copy.deepcopy(net.neuron))
    outputs = own(net.fc(x_seq).movedim(0, 1)).movedim(1, 0)
    wanted = torch.autograd.grad(
        sum(F.cross_entropy(output, target) for output in outputs) / T, [*net.fc.parameters(), own.decay]
    )
    sltt_ext.convert(net)
    sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0).forward_backward(x_seq, target)
    for parameter, gradient in zip((*net.fc.parameters(), net.neuron.decay), wanted):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    wrong = sltt_ext.OnlineTrainer(
        sltt_ext.convert(OneStepAtATime(axis=False)), F.cross_entropy, T, time_dim=0
    )
    with pytest.raises(ConfigurationError, match=r"BatchFirst takes \[N, T, ...\], and got shape"):
        wrong.forward_backward(x_seq, target)


def test_copies_and_pickles():
    converted = sltt_ext.convert(HardReset())
    x_seq = torch.randn(T, N, 3)
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert type(twin) is type(converted)
        assert torch.equal(twin(x_seq), HardReset()(x_seq))


def test_a_subclass_is_declared_with_its_base_and_compared():
    class Softer(HardReset):
        def one(self, x, mem):
            mem = x if mem is None else self.decay * mem + x
            spike = fire(mem - 1.0)
            return spike, mem - spike

    class Renamed(HardReset):
        pass

    x_seq = torch.randn(T, N, 3)
    assert torch.equal(sltt_ext.convert(Renamed())(x_seq), HardReset()(x_seq))
    with pytest.raises(
        DeclarationError, match="declared step of Softer differs from its forward at time step 1"
    ):
        sltt_ext.convert(Softer())(x_seq)


def a_class():
    class Mine(HardReset):
        pass

    return Mine


def right(module, x, mem):
    mem = x if mem is None else module.decay * mem + x
    spike = fire(mem - 1.0)
    return spike, mem * (1 - spike)


def wrong_number(module, x, mem):
    return right(module, x, mem)[0]


def wrong_value(module, x, mem):
    spike, mem = right(module, x, mem)
    return spike, mem * 0.9


def wrong_shape(module, x, mem):
    spike, mem = right(module, x, mem)
    return spike.sum(-1), mem


def whole_sequence_as_state(module, x, mem):
    spike, left = right(module, x, mem if mem is None else mem[0])
    return spike, torch.stack([left] * 7)


def wrong_gradient(module, x, mem):
    spike, mem = right(module, x, mem)
    return spike * 2 - spike.detach(), mem


def wrong_gradient_of_parameters(module, x, mem):
    mem = x if mem is None else module.decay.detach() * mem + x
    spike = fire(mem - 1.0)
    return spike, mem * (1 - spike)


def keeps_a_graph(module, x, mem):
    spike, mem = right(module, x, mem)
    module.record = [*getattr(module, "record", []), mem]
    return spike, mem


def fails(module, x, mem):
    return right(module, x, mem + 1)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (
            wrong_number,
            r"step of Mine takes 1 states, so it has to return \(output, mem\), and returned a Tensor",
        ),
        (wrong_value, "declared step of Mine differs from its forward at time step 1"),
        (wrong_shape, r"one step of Mine returns shapes .* by the declared step"),
        (whole_sequence_as_state, r"step of Mine left mem with shape \[7, "),
        (wrong_gradient, "gradient of the declared step of Mine is not that of its forward"),
        (wrong_gradient_of_parameters, "gradient of the parameters of Mine is not the same"),
        (keeps_a_graph, "step of Mine keeps record with its graph"),
        (fails, r"step of Mine failed \(TypeError"),
    ],
)
def test_a_step_that_is_not_the_class(step, says):
    cls = a_class()
    sltt_ext.declare_neuron(cls, time_dim=0)(step)
    converted = sltt_ext.convert(cls())
    x_seq = torch.randn(T, N, 3)
    for _ in range(2):  # it stays an error
        with pytest.raises(DeclarationError, match=says):
            converted(x_seq)
    sltt_ext.declare_neuron(cls, time_dim=0)(right)
    assert torch.equal(converted(x_seq), HardReset()(x_seq))


@pytest.mark.parametrize(
    ("declare", "says"),
    [
        (lambda cls: sltt_ext.declare_neuron(cls()), "takes a class of neurons"),
        (lambda cls: sltt_ext.declare_neuron(cls, time_dim=2), "time_dim of Mine must be 0, 1 or None"),
        (lambda cls: sltt_ext.declare_neuron(cls, time_dim=0, state="mem"), "time_dim=0 and state="),
        (
            lambda cls: sltt_ext.declare_neuron(cls, as_lif=dict),
            "needs the one attribute that holds its potential",
        ),
        (
            lambda cls: sltt_ext.declare_neuron(cls)(lambda module, x: x),
            "the step of Mine must be a function",
        ),
        (
            lambda cls: sltt_ext.declare_neuron(cls)(lambda module, x, *state: x),
            "the step of Mine must be a function",
        ),
    ],
)
def test_declarations_that_cannot_be(declare, says):
    with pytest.raises(ConfigurationError, match=says):
        declare(a_class())


def test_as_lif_with_other_settings():
    cls = a_class()
    sltt_ext.declare_neuron(cls, time_dim=0, as_lif=lambda m: {"tau": 2.0, "surrogate": Surrogate()})
    with pytest.raises(DeclarationError, match="declared step of Mine differs"):
        sltt_ext.convert(cls())(torch.randn(T, N, 3))
    sltt_ext.declare_neuron(cls, time_dim=0, as_lif=lambda m: {"decay": 2.0, "surrogate": Surrogate()})
    with pytest.raises(DeclarationError, match=r"as_lif of Mine must return surrogate=.* got decay"):
        sltt_ext.convert(cls())(torch.randn(T, N, 3))


def test_spikes_that_are_none():
    sltt_ext.declare_neuron(WithPotential, time_dim=0, spikes=1)(Declared.declarations[WithPotential].step)
    with pytest.raises(
        DeclarationError, match="spikes=1 of WithPotential names an output with numbers other than 0 and 1"
    ):
        sltt_ext.convert(WithPotential())(torch.randn(T, N, 3))

    class Graded(Attributes):
        def forward(self, x):
            return super().forward(x) * 0.5

    sltt_ext.declare_neuron(Graded, state=("mem", "spike"), spikes=0)
    with pytest.raises(DeclarationError, match="spikes=0 of Graded"):
        sltt_ext.convert(Graded())(torch.full((N, 3), 2.0))


class Trace(Attributes):
    """A third attribute, which has no graph, and so no gradient to tell it by."""

    def __init__(self):
        super().__init__()
        self.trace = 0.0

    def forward(self, x):
        self.trace = 0.9 * self.trace + x.detach()
        return super().forward(x + self.trace)


class Cell:
    def __init__(self):
        self.mem = 0.0


class Nested(Attributes):
    """The potential in an object of its own."""

    def __init__(self):
        super().__init__()
        self.cell = Cell()

    def forward(self, x):
        self.cell.mem = self.cell.mem * self.decay * (1 - self.spike) + x
        self.spike = fire(self.cell.mem - 0.5)
        return self.spike


class Recurrent(Attributes):
    """The potential in a list that is changed in place."""

    def __init__(self):
        super().__init__()
        self.states = [0.0]

    def forward(self, x):
        self.states[0] = self.states[0] * self.decay + x
        return fire(self.states[0] - 0.5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("cls", "state", "says"),
    [
        (Attributes, "mem", "carries more from step to step than mem: name all attributes"),
        (Trace, ("mem", "spike"), "carries more from step to step than mem, spike"),
        (Nested, "spike", "carries more from step to step than spike"),
        (Nested, ("cell", "spike"), "give a step function where an object holds them"),
        (Attributes, ("mem", "spike", "men"), "has no attribute men after a step"),
        (Attributes, ("mem", "spike", "decay"), "names decay, which is a parameter"),
    ],
)
def test_wrong_names(cls, state, says, grad):
    class Mine(cls):
        pass

    sltt_ext.declare_neuron(Mine, state=state)
    converted = sltt_ext.convert(Mine())
    for _ in range(2):  # it stays an error, and leaves the neuron at rest
        with pytest.raises(DeclarationError, match=f"Mine.* {says}"), torch.set_grad_enabled(grad):
            converted(torch.randn(N, 3))
    assert converted.mem == 0.0
    assert vars(getattr(converted, "cell", Cell())) == {"mem": 0.0}


@pytest.mark.parametrize("cls", [Recurrent, Trace])
def test_names_of_other_states(cls):
    """A list, and an attribute beside the usual ones; a second sequence starts from rest."""
    sltt_ext.declare_neuron(cls, state="states" if cls is Recurrent else ("mem", "spike", "trace"))
    original, converted = cls(), sltt_ext.convert(cls())
    x_seq, weight = 2 * torch.randn(T, N, 3), torch.rand(T, N, 3)

    def detach(module, _):
        module.states = [torch.as_tensor(each).detach() for each in module.states]

    if cls is Recurrent:
        original.register_forward_pre_hook(detach)
    else:
        oracle_of(original)
    expected, wanted = gradients(original, x_seq, weight)
    for _ in range(2):
        outputs, got = gradients(converted, x_seq, weight)
        assert torch.equal(outputs, expected)
        assert all(map(torch.equal, got, wanted))
        converted.reset_state()


def test_convert_at_rest():
    net = Attributes()
    net(torch.randn(N, 3, requires_grad=True))
    with pytest.raises(
        ConfigurationError, match="Attributes has run before it was converted, and mem is not at rest"
    ):
        sltt_ext.convert(net)(torch.randn(N, 3))


def test_what_is_not_declared_is_not_known():
    class Other(nn.Module):
        def forward(self, x):
            return fire(x)

    with pytest.raises(ConversionError, match=r"sltt_ext.declare_neuron"):
        sltt_ext.convert(Other())


def test_the_comparison_stands_aside():
    """Hooks on saved tensors, modes and random numbers of whoever calls first are not in it, nor does it leave any."""

    def refuse(_):
        raise AssertionError("unpacked")

    x_seq = torch.randn(T, N, 3)
    expected = HardReset()(x_seq)
    for mode in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autograd.graph.saved_tensors_hooks(lambda _: None, refuse),
    ):
        with mode:
            before = torch.get_rng_state()
            spikes = sltt_ext.convert(HardReset())(x_seq)
            assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(spikes, expected)
