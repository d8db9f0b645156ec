import copy
import pickle

import oracle
import pytest
import snntorch
import torch
from snntorch import surrogate, utils
from snntorch_neurons import (
    CASES,
    DENSE,
    FUSED,
    GENERIC,
    Adaptive,
    NoisyLeaky,
    QuadraticLeaky,
    RenamedLeaky,
    ids,
)
from torch import nn

import sltt_ext
from sltt_ext.errors import ConversionError
from sltt_ext.snntorch import SLTTLeaky
from sltt_ext.snntorch.neurons import FusedLeaky, StepwiseNeuron

pytestmark = pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")


def make(cls, kwargs, **more):
    torch.manual_seed(0)
    kwargs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return cls(**kwargs, **more)


def currents(shape, seed=0, time_steps=6):
    return 1.5 * torch.randn(time_steps, *shape, generator=torch.Generator().manual_seed(seed)) + 0.4


def detach_by_hand(neuron):
    """Every tensor the module has kept, as the tutorials detach it; no sltt_ext in here."""
    for name in ("spk", "syn", "syn_exc", "syn_inh", "mem", "mem_prev"):
        if isinstance(getattr(neuron, name, None), torch.Tensor):
            setattr(neuron, name, getattr(neuron, name).detach())
    if isinstance(neuron, Adaptive) and neuron.state[0] is not None:
        neuron.state = (neuron.state[0].detach(), neuron.state[1])


def explicit_start(neuron, x):
    if type(neuron).__name__.endswith("DeltaLeaky"):
        return ((None, None),)
    return ()


def tensors(returned):
    """Everything a step returns, flat."""
    if isinstance(returned, torch.Tensor):
        return [returned]
    return [tensor for part in returned for tensor in tensors(part)]


def detached(state):
    if isinstance(state, tuple):
        return tuple(map(detached, state))
    return state if state is None else state.detach()


def run(neuron, x_seq, explicit, by_hand, backward=True):
    """Step, with a loss on everything that is returned; returns outputs and gradients."""
    x_seq = x_seq.clone().requires_grad_()
    neuron.zero_grad()
    neuron.reset_mem()
    outputs, states = [], explicit_start(neuron, x_seq) if explicit else ()
    weights = torch.Generator().manual_seed(9)
    for x in x_seq:
        if by_hand:
            detach_by_hand(neuron)
            states = detached(states)
        returned = neuron(x, *states)
        if explicit:
            states = tuple(returned[1:])
        returned = tensors(returned)
        outputs.append([tensor.detach().clone() for tensor in returned])
        loss = sum((tensor * torch.randn(tensor.shape, generator=weights)).sum() for tensor in returned)
        if loss.requires_grad:
            loss.backward()
    return outputs, [x_seq.grad, *oracle.gradients(neuron)]


def both(cls, kwargs, shape, explicit, **more):
    """Outputs and gradients of the converted neuron, and of the original with its state detached by hand."""
    original = make(cls, kwargs, init_hidden=not explicit, **more)
    converted = sltt_ext.convert(copy.deepcopy(original))
    x_seq = currents(shape)
    return run(converted, x_seq, explicit, by_hand=False), run(original, x_seq, explicit, by_hand=True)


def assert_identical(outputs, expected):
    for got, want in zip(outputs, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


STATE = pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "init_hidden"])


@STATE
@pytest.mark.parametrize(("cls", "kwargs", "shape"), FUSED, ids=ids(FUSED))
def test_fused(cls, kwargs, shape, explicit):
    (outputs, gradients), (expected, expected_gradients) = both(cls, kwargs, shape, explicit)
    assert_identical(outputs, expected)
    assert oracle.relative_error(gradients[0], expected_gradients[0]) < 1e-6
    for got, want in zip(gradients[1:], expected_gradients[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)  # rounding of sums of some hundred terms


@STATE
@pytest.mark.parametrize(("cls", "kwargs", "shape"), GENERIC, ids=ids(GENERIC))
def test_generic(cls, kwargs, shape, explicit):
    (outputs, gradients), (expected, expected_gradients) = both(cls, kwargs, shape, explicit)
    assert_identical(outputs, expected)
    for got, want in zip(gradients, expected_gradients, strict=True):
        assert (got is None) == (want is None)
        assert want is None or torch.equal(got, want)


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("cls", [snntorch.Leaky, snntorch.Lapicque, snntorch.Synaptic])
def test_what_a_step_returns(cls, output):
    kwargs = {"alpha": 0.7} if cls is snntorch.Synaptic else {}
    for init_hidden in (True, False):
        original = cls(beta=0.8, init_hidden=init_hidden, output=output, **kwargs)
        converted = sltt_ext.convert(copy.deepcopy(original))
        x = currents(DENSE)[0]
        assert type(converted(x)) is type(original(x))
        assert len(tensors(converted(x))) == len(tensors(original(x)))


@STATE
def test_bptt_gradient_is_different(explicit):
    """The oracle is not BPTT in disguise: the original's own gradient has temporal terms."""
    original, x_seq = snntorch.Leaky(beta=0.9, init_hidden=not explicit), currents(DENSE).requires_grad_()
    states, total = (), 0
    for x in x_seq:
        returned = original(x, *states)
        states = tuple(returned[1:]) if explicit else ()
        total = total + tensors(returned)[0].sum()
    total.backward()
    bptt, x_seq.grad = x_seq.grad, None
    converted, states, total = sltt_ext.convert(original), (), 0
    converted.reset_mem()
    for x in x_seq:
        returned = converted(x, *states)
        states = tuple(returned[1:]) if explicit else ()
        total = total + tensors(returned)[0].sum()
    total.backward()
    assert oracle.relative_error(bptt, x_seq.grad) > 0.01


def test_passing_a_state_to_a_neuron_that_keeps_it_is_snntorchs_error():
    converted = sltt_ext.convert(snntorch.Leaky(beta=0.8, init_hidden=True))
    x = currents(DENSE)[0]
    with pytest.raises(TypeError, match="init_hidden=True"):
        converted(x, torch.zeros_like(x))


@pytest.mark.parametrize(("states", "named"), [((0, 0), {}), ((), {"syn": 0})])
def test_arguments_that_the_original_does_not_take(states, named):
    converted = sltt_ext.convert(snntorch.Leaky(beta=0.8))
    with pytest.raises(TypeError):
        converted(currents(DENSE)[0], *states, **named)


def test_state_passed_by_name():
    original = snntorch.Leaky(beta=0.8)
    converted = sltt_ext.convert(copy.deepcopy(original))
    x, mem = currents(DENSE)[:2]
    assert all(torch.equal(*pair) for pair in zip(converted(x, mem=mem), original(x, mem=mem)))


def test_new_batch_size_starts_from_zero_as_the_original_does():
    original = snntorch.Leaky(beta=0.8, init_hidden=True)
    converted = sltt_ext.convert(copy.deepcopy(original))
    for batch in (4, 3):
        x = currents(DENSE)[0][:batch]
        assert torch.equal(converted(x), original(x))
        assert torch.equal(converted.mem, original.mem)


def test_a_reset_mechanism_changed_later_does_what_the_original_does():
    for delay in (True, False):
        original = snntorch.Leaky(beta=0.8, init_hidden=True, reset_delay=delay)
        converted = sltt_ext.convert(copy.deepcopy(original))
        for neuron in (original, converted):
            neuron.reset_mechanism = "zero"
        for x in currents(DENSE):
            assert torch.equal(converted(x), original(x))
            assert torch.equal(converted.mem, original.mem)


def test_which_path():
    assert type(sltt_ext.convert(snntorch.Leaky(beta=0.8))) is SLTTLeaky
    assert isinstance(sltt_ext.convert(RenamedLeaky()), FusedLeaky)
    for neuron in (NoisyLeaky(beta=0.8), QuadraticLeaky(beta=0.8), snntorch.Lapicque(beta=0.8)):
        assert not isinstance(sltt_ext.convert(neuron), FusedLeaky)
        assert isinstance(neuron, StepwiseNeuron)


def test_convert_and_revert():
    for cls, kwargs, _ in CASES:
        neuron = make(cls, kwargs)
        names = list(neuron.state_dict())
        converted = sltt_ext.convert(neuron)
        assert converted is neuron
        assert isinstance(neuron, cls)
        assert list(neuron.state_dict()) == names
        assert type(sltt_ext.revert(neuron)) is cls
        assert "sltt_backend" not in vars(neuron)


def test_new_networks():
    lif = SLTTLeaky(beta=0.8, init_hidden=True)
    assert torch.equal(
        lif(currents(DENSE)[0]), snntorch.Leaky(beta=0.8, init_hidden=True)(currents(DENSE)[0])
    )
    assert type(sltt_ext.revert(lif)) is snntorch.Leaky


EVERY_CLASS = list({cls: (cls, kwargs, shape) for cls, kwargs, shape in CASES}.values())


@pytest.mark.parametrize(("cls", "kwargs", "shape"), EVERY_CLASS, ids=ids(EVERY_CLASS))
def test_snntorchs_lists_of_all_neurons_keep_working(cls, kwargs, shape):
    nets = [nn.Sequential(make(cls, kwargs, init_hidden=True)) for _ in range(2)]
    before = list(snntorch.SpikingNeuron.instances)
    sltt_ext.convert(nets[0])
    outputs = [[], []]
    for x in currents(shape)[:3]:
        for net, own in zip(nets, outputs):
            own.append([tensor.detach() for tensor in tensors(net(x))])
        utils.reset(nets[0])
    assert_identical(*outputs)
    assert snntorch.SpikingNeuron.instances == before
    assert before == [net[0] for net in nets]


def test_detach_hidden_and_reset_hidden():
    lif = sltt_ext.convert(snntorch.Leaky(beta=0.9, init_hidden=True))
    x = currents(DENSE)[0].requires_grad_()
    lif(x)
    assert lif.mem.grad_fn is not None
    snntorch.Leaky.detach_hidden()
    assert lif.mem.grad_fn is None
    assert (lif.mem != 0).any()
    snntorch.Leaky.reset_hidden()
    assert (lif.mem == 0).all()


def picklable_surrogate(u):
    return surrogate.FastSigmoid.apply(u, 25)


@pytest.mark.parametrize("cls", [snntorch.Leaky, snntorch.Synaptic, RenamedLeaky])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda neuron: pickle.loads(pickle.dumps(neuron))])
def test_copies_and_pickles(cls, duplicate):
    kwargs = {snntorch.Leaky: {"beta": 0.8}, snntorch.Synaptic: {"alpha": 0.7, "beta": 0.8}}.get(cls, {})
    neuron = sltt_ext.convert(cls(init_hidden=True, spike_grad=picklable_surrogate, **kwargs))
    x_seq = currents(DENSE)
    neuron(x_seq[0])
    twin = duplicate(neuron)
    assert type(twin) is type(neuron)
    assert twin.state_function.__self__ is twin
    assert torch.equal(twin(x_seq[1]), neuron(x_seq[1]))
    assert type(sltt_ext.revert(twin)) is cls


class Unresettable(snntorch.SpikingNeuron):
    def forward(self, input_):
        return self.fire(input_)


def test_a_lapicque_neuron_that_learns_nothing():
    """snnTorch computes R and C of beta once, so that its steps do not read what is learned."""
    with pytest.raises(ConversionError, match=r"learn_beta=True learns nothing.*Leaky\(learn_beta=True\)"):
        sltt_ext.convert(snntorch.Lapicque(beta=0.8, learn_beta=True))

    class ReadsBeta(snntorch.Lapicque):
        def _base_state_function(self, input_):
            return input_ + self.beta * self.mem

    for neuron in (snntorch.Lapicque(beta=0.8), ReadsBeta(beta=0.8, learn_beta=True)):
        assert sltt_ext.is_converted(sltt_ext.convert(neuron))


def test_refusal_lists_every_module_and_changes_nothing():
    net = nn.ModuleDict({"good": snntorch.Leaky(beta=0.9), "own": Unresettable()})
    refused = {
        "LeakyParallel": {"input_size": 3, "hidden_size": 3},
        "StateLeaky": {"beta": 0.9, "channels": 3},
        "LinearLeaky": {"beta": 0.9, "in_features": 3, "out_features": 3},
        "AssociativeLeaky": {"in_dim": 3, "d_value": 2, "d_key": 2, "num_spiking_neurons": 4},
    }
    for name, kwargs in refused.items():
        if hasattr(snntorch, name):
            net[name] = getattr(snntorch, name)(**kwargs)
    with pytest.raises(ConversionError, match="nothing was converted") as caught:
        sltt_ext.convert(net)
    assert set(caught.value.reasons) == set(net) - {"good"}
    assert "use a neuron that runs step by step" in str(caught.value)
    assert "define it, as snnTorch's own neurons do" in caught.value.reasons["own"]
    assert not sltt_ext.is_converted(net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_state_in_float32(dtype):
    lif = sltt_ext.convert(snntorch.Leaky(beta=0.9)).to(dtype)
    spk, mem = lif(currents(DENSE)[0].to(dtype))
    assert spk.dtype == dtype
    assert mem.dtype == torch.float32


def test_float64_is_snntorchs_own_mix():
    original = snntorch.Leaky(beta=0.9)
    converted = sltt_ext.convert(copy.deepcopy(original))
    x = currents(DENSE)[0].double()
    for got, want in zip(converted(x), original(x)):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


SURROGATES = {
    "atan": surrogate.atan(),
    "fast_sigmoid": surrogate.fast_sigmoid(),
    "sigmoid": surrogate.sigmoid(slope=5),
    "triangular": surrogate.triangular(),
    "straight_through_estimator": surrogate.straight_through_estimator(),
    "heaviside": surrogate.heaviside(),
    "SFS": surrogate.SFS(slope=2, B=0.2),
    "spike_rate_escape": surrogate.spike_rate_escape(),
    "SSO": surrogate.SSO(),
    "custom": surrogate.custom_surrogate(lambda u, grad, spikes: grad * torch.exp(-u.abs())),
    "any callable": picklable_surrogate,
}


@pytest.mark.parametrize("name", SURROGATES)
@STATE
def test_every_surrogate(name, explicit):
    results = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        lif = snntorch.Leaky(
            beta=0.8, spike_grad=SURROGATES[name], init_hidden=not explicit, learn_threshold=True
        )
        lif = lif if by_hand else sltt_ext.convert(lif)
        torch.manual_seed(0)  # SSO's gradient is random
        results.append(run(lif, currents(DENSE), explicit, by_hand))
    (expected, expected_gradients), (outputs, gradients) = results
    assert_identical(outputs, expected)
    assert oracle.relative_error(gradients, expected_gradients) < 1e-6
