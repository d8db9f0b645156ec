"""Declarations that are not what the class does, or cannot be: each is refused, and says why."""

import pytest
import torch
from declared_neurons import Attributes, HardReset, N, T, WithPotential, fire, gradients, oracle_of
from torch import nn

import sltt_ext
from sltt_ext.declared.adapters import Declared
from sltt_ext.errors import ConfigurationError, ConversionError, DeclarationError
from sltt_ext.surrogate import Surrogate


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
