import copy
import operator
import pickle
from types import SimpleNamespace

import networks
import oracle
import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, InputError, LossError, SLTTError

T = 6
NEURONS = [
    (neuron.LIFNode, {}),
    (neuron.LIFNode, {"tau": 1.1, "decay_input": False, "v_reset": None}),
    (neuron.IFNode, {}),
    (neuron.ParametricLIFNode, {}),
    (neuron.QIFNode, {}),
]
MODES = [("s", 1), ("m", 1), ("m", 2), ("m", 3), ("m", T)]


def trainer(net, time_steps=T, loss_fn=F.cross_entropy, **options):
    return sltt_ext.OnlineTrainer(sltt_ext.convert(net), loss_fn, time_steps, **options)


def online_gradients(net, x, target, step_mode="s", **options):
    net = copy.deepcopy(net)
    functional.set_step_mode(net, step_mode)
    result = trainer(net, **options).forward_backward(x, target)
    return oracle.gradients(net), result


@pytest.mark.parametrize(("step_mode", "chunk"), MODES)
@pytest.mark.parametrize(("cls", "kwargs"), NEURONS)
def test_gradients_are_the_oracles(cls, kwargs, step_mode, chunk):
    net = networks.conv_net(cls, **kwargs)
    x, target = networks.images()
    expected = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy)
    actual, result = online_gradients(net, x, target, step_mode, chunk=chunk)
    assert oracle.relative_error(actual, expected) < 1e-6
    assert result.time_steps == tuple(range(T))
    if cls is neuron.QIFNode and step_mode == "s":
        actual, _ = online_gradients(net, x, target, step_mode, cache_invariant=False)
        assert all(torch.equal(*pair) for pair in zip(actual, expected))


def test_spiking_resnet18_in_training():
    net = networks.resnet18()
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    expected = oracle.sltt_gradients(net, [x] * 4, target, F.cross_entropy)
    for step_mode in "sm":
        actual, _ = online_gradients(net, x, target, step_mode, time_steps=4)
        assert oracle.relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_spiking_resnet18_in_chunks(chunk):
    """With batch-norm statistics frozen: in training they are taken over what is in the chunk."""
    net = networks.freeze_batch_norm(networks.resnet18())
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    expected = oracle.sltt_gradients(net, [x] * 4, target, F.cross_entropy)
    actual, _ = online_gradients(net, x, target, "m", time_steps=4, chunk=chunk)
    assert oracle.relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_convert_alone_with_the_users_own_loop(step_mode):
    net = networks.conv_net(neuron.ParametricLIFNode)
    x, target = networks.images()
    expected = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy)
    functional.set_step_mode(net, step_mode)
    sltt_ext.convert(net)
    x_seq = x.expand(T, *x.shape)
    outputs = net(x_seq) if step_mode == "m" else [net(x) for x in x_seq]
    torch.stack([F.cross_entropy(output, target) for output in outputs]).mean().backward()
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6


@pytest.mark.parametrize(("scale", "divisor"), [("mean", 2), ("paper", T)])
@pytest.mark.parametrize(("step_mode", "chunk"), MODES)
def test_sltt_k(scale, divisor, step_mode, chunk):
    net = networks.conv_net()
    x, target = networks.images()
    actual, result = online_gradients(
        net, x, target, step_mode, chunk=chunk, k=2, scale=scale, generator=torch.Generator().manual_seed(3)
    )
    assert len(set(result.time_steps)) == 2
    expected = oracle.sltt_gradients(
        net, [x] * T, target, F.cross_entropy, selected=result.time_steps, divisor=divisor
    )
    assert oracle.relative_error(actual, expected) < 1e-6


def test_sltt_k_is_unbiased():
    """The mean of SLTT-1's gradients over all steps it can draw is SLTT's gradient."""
    net = networks.conv_net()
    x, target = networks.images()
    expected, _ = online_gradients(net, x, target)
    singles = [online_gradients(net, x, target, schedule=lambda *_, t=t: [t])[0] for t in range(T)]
    mean = [torch.stack(gradients).mean(0) for gradients in zip(*singles)]
    assert oracle.relative_error(mean, expected) < 1e-6


def test_generator_decides_the_steps():
    x, target = networks.images()

    def drawn(seed):
        online = trainer(networks.conv_net(), k=2, generator=torch.Generator().manual_seed(seed))
        return [online.forward_backward(x, target).time_steps for _ in range(5)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert len(set(drawn(0))) > 1


def test_default_generator_follows_manual_seed():
    online = trainer(networks.conv_net(), k=3)
    x, target = networks.images()
    torch.manual_seed(7)
    first = online.forward_backward(x, target).time_steps
    torch.manual_seed(7)
    assert online.forward_backward(x, target).time_steps == first


def sequence(time_steps=T):
    return 2 * torch.rand(time_steps, 3, 1, 8, 8)


INPUTS = {
    "time_first": (lambda x_seq: x_seq, 0),
    "batch_first": (lambda x_seq: x_seq.transpose(0, 1), 1),
    "list": (list, None),
    "stream": (iter, None),
}


@pytest.mark.parametrize("kind", sorted(INPUTS))
@pytest.mark.parametrize(("step_mode", "chunk"), MODES)
def test_sequences_and_streams(kind, step_mode, chunk):
    net = networks.conv_net()
    x_seq, target = sequence(), networks.images()[1]
    expected = oracle.sltt_gradients(net, list(x_seq), target, F.cross_entropy)
    give, time_dim = INPUTS[kind]
    actual, _ = online_gradients(net, give(x_seq), target, step_mode, chunk=chunk, time_dim=time_dim)
    assert oracle.relative_error(actual, expected) < 1e-6


def test_result_is_what_the_network_did():
    net = networks.conv_net()
    x, target = networks.images()
    outputs = [net(x) for _ in range(T)]
    functional.reset_net(net)
    online = trainer(net)
    result = online.forward_backward(x, target)
    torch.testing.assert_close(result.output, torch.stack(outputs).mean(0))
    losses = [F.cross_entropy(output, target) for output in outputs]
    torch.testing.assert_close(result.loss, torch.stack(losses).mean())
    assert not result.loss.requires_grad
    assert not result.output.requires_grad
    torch.testing.assert_close(online.predict(x), result.output)


@pytest.mark.parametrize(("step_mode", "chunk"), [("s", 1), ("m", 3)])
def test_full_output(step_mode, chunk):
    net = networks.conv_net(step_mode=step_mode)
    x, target = networks.images()
    outputs = {}
    gradients = {}
    for full in (True, False):
        online = trainer(copy.deepcopy(net), chunk=chunk, schedule=lambda *_: [0, 2], full_output=full)
        outputs[full] = online.forward_backward(x, target).output
        gradients[full] = oracle.gradients(online.net)
    assert all(torch.equal(*pair) for pair in zip(gradients[True], gradients[False]))
    single = networks.conv_net()
    steps = torch.stack([single(x) for _ in range(T)])
    torch.testing.assert_close(outputs[True], steps.mean(0))
    torch.testing.assert_close(outputs[False], steps[:3].mean(0))


def test_predict_keeps_gradients_and_starts_from_rest():
    online = trainer(networks.conv_net())
    x, _ = networks.images()
    first = online.predict(x)
    assert torch.equal(online.predict(x), first)
    assert oracle.gradients(online.net) == [None] * 6


def test_gradients_accumulate():
    net = networks.conv_net()
    x, target = networks.images()
    online = trainer(net)
    online.forward_backward(x, target)
    once = [gradient.clone() for gradient in oracle.gradients(net)]
    online.forward_backward(x, target)
    assert oracle.relative_error(oracle.gradients(net), [2 * gradient for gradient in once]) < 1e-6


def test_backward_hook():
    net = networks.conv_net()
    x, target = networks.images()
    expected, _ = online_gradients(net, x, target)
    actual, _ = online_gradients(net, x, target, backward=lambda loss: (8 * loss).backward())
    assert oracle.relative_error(actual, [8 * gradient for gradient in expected]) < 1e-6


class Membrane(nn.Module):
    """Returns spikes and membrane potential, as snnTorch networks do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.node = neuron.LIFNode()

    def forward(self, x):
        spikes = self.node(3 * self.linear(x))
        return spikes, self.node.v


@pytest.mark.parametrize(
    ("output", "index"), [(None, 0), ("membrane", 1), (operator.itemgetter(1), 1)], ids=repr
)
def test_which_output_the_loss_reads(output, index):
    net = Membrane()
    x, target = torch.rand(5, 4), torch.rand(5, 3)
    reference = copy.deepcopy(net)
    for _ in range(T):
        (F.mse_loss(reference(x)[index], target) / T).backward()
        functional.detach_net(reference)
    online = trainer(net, loss_fn=F.mse_loss, output=output)
    online.forward_backward(x, target)
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(reference)) < 1e-6


def test_runs_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net = networks.conv_net()
        x, target = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.long)
        for options in ({}, {"k": 2}):
            result = trainer(net, **options).forward_backward(x, target)
        assert result.output.shape == (3, 5)
        assert net[0].weight.grad.shape == net[0].weight.shape


def test_no_graph_survives_the_call():
    net = networks.conv_net(neuron.QIFNode)
    online = trainer(net)
    online.forward_backward(*networks.images())
    states = [state for module in net.modules() for state in getattr(module, "_memories", {}).values()]
    assert len(states) == 2
    assert not any(state.requires_grad for state in states)


CONFIGURATION = {
    "k=0": ({"k": 0}, "k must be an integer from 1 to time_steps=6, got 0"),
    "k=7": ({"k": 7}, "k must be an integer from 1 to time_steps=6, got 7"),
    "k=2.0": ({"k": 2.0}, "k must be an integer"),
    "time_steps=0": ({"time_steps": 0}, "time_steps must be a positive integer"),
    "chunk=0": ({"chunk": 0}, "chunk must be a positive integer"),
    "chunk=2": ({"chunk": 2}, r"chunk=2 needs a multi-step network.*set_step_mode\(net, 'm'\)"),
    "scale": ({"scale": "sum"}, "scale must be 'mean' or 'paper'"),
    "time_dim": ({"time_dim": 2}, "time_dim must be None, 0 or 1"),
    "output": ({"output": "spikes"}, "output must be None, 'spike', 'membrane' or a function"),
    "k and schedule": ({"k": 1, "schedule": lambda *_: [0]}, "not both"),
}


@pytest.mark.parametrize("case", sorted(CONFIGURATION))
def test_bad_options(case):
    options, message = CONFIGURATION[case]
    with pytest.raises(ConfigurationError, match=message):
        trainer(networks.conv_net(), **options)


def test_network_that_is_not_converted():
    with pytest.raises(SLTTError, match=r"call sltt_ext\.convert\(net\) first"):
        sltt_ext.OnlineTrainer(networks.conv_net(), F.cross_entropy, T)


def detached_output(net):
    net.append(Detach())


class Detach(nn.Module):
    def forward(self, x):
        return x.detach()


def stops_after(frames):
    yield from sequence(frames)


X, TARGET = networks.images()
BAD_CALLS = {
    "too few frames": ({}, lambda: sequence(4).unbind(), TARGET, InputError, "4 frames.*time_steps=6"),
    "too many frames": ({}, lambda: sequence(8).unbind(), TARGET, InputError, "8 frames.*time_steps=6"),
    "too long a sequence": ({"time_dim": 0}, lambda: sequence(8), TARGET, InputError, "8 steps along time_dim=0"),
    "stream that ends": ({}, lambda: stops_after(4), TARGET, InputError, "ended after 4 frames"),
    "empty batch": ({}, lambda: X[:0], TARGET[:0], InputError, "drop_last=True"),
    "empty frame": ({}, lambda: [X[:0]] * T, TARGET[:0], InputError, "empty frame at step 0"),
    "no data": ({}, lambda: 3, TARGET, InputError, "tensor or an iterable"),
    "time_dim of a list": ({"time_dim": 0}, lambda: [X] * T, TARGET, InputError, "needs a tensor"),
    "loss per sample": (
        {"loss_fn": lambda o, y: F.cross_entropy(o, y, reduction="none")},
        lambda: X, TARGET, LossError, r"scalar tensor, got shape \[3\]",
    ),
    "loss is a number": ({"loss_fn": lambda o, y: 1.0}, lambda: X, TARGET, LossError, "got float"),
    "loss needs no grad": (
        {"loss_fn": lambda o, y: F.cross_entropy(o.detach(), y)},
        lambda: X, TARGET, LossError, "needs no gradient",
    ),
    "output is no tensor": ({"output": lambda o: {"o": 1}}, lambda: X, TARGET, LossError, "is a dict.*output="),
    "schedule out of range": (
        {"schedule": lambda *_: [T]}, lambda: X, TARGET, ConfigurationError, "from 0 to 5",
    ),
    "empty schedule": ({"schedule": lambda *_: []}, lambda: X, TARGET, ConfigurationError, "one or more"),
    "step drawn twice": ({"schedule": lambda *_: [1, 1]}, lambda: X, TARGET, ConfigurationError, "different"),
}  # fmt: skip


@pytest.mark.parametrize("accumulating", [False, True])
@pytest.mark.parametrize("case", sorted(BAD_CALLS))
def test_bad_calls_leave_nothing_half_written(case, accumulating):
    options, x, target, error, message = BAD_CALLS[case]
    net = networks.conv_net()
    online = trainer(net, **options)
    if accumulating:
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
    with pytest.raises(error, match=message):
        online.forward_backward(x(), target)
    for gradient in oracle.gradients(net):
        assert gradient is None if not accumulating else torch.equal(gradient, torch.ones_like(gradient))
    assert net[1].v == 0.0


def test_frozen_network_and_no_grad():
    net = networks.conv_net()
    online = trainer(net)
    with torch.no_grad(), pytest.raises(LossError, match="no_grad"):
        online.forward_backward(X, TARGET)
    net.requires_grad_(False)
    with pytest.raises(LossError, match="no parameter of the network requires one"):
        online.forward_backward(X, TARGET)


def test_multi_step_network_that_averages_over_time():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(0)

    net = networks.conv_net(step_mode="m").append(Mean())
    with pytest.raises(LossError, match="leave the average over time to the trainer"):
        trainer(net, chunk=T).forward_backward(X, TARGET)


def test_state_that_the_conversion_does_not_see():
    class InAnObject(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = SimpleNamespace(previous=0.0)

        def forward(self, x):
            self.kept.previous = 0.5 * self.kept.previous + x
            return self.kept.previous

    net = networks.conv_net().append(InAnObject())
    with pytest.raises(LossError, match="register_memory"):
        trainer(net).forward_backward(X, TARGET)
    assert oracle.gradients(net) == [None] * 6


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, torch.cuda.OutOfMemoryError])
def test_exception_on_the_way(interrupt):
    net = networks.conv_net()
    calls = []

    def loss_fn(output, target):
        calls.append(1)
        if len(calls) == 4:
            raise interrupt
        return F.cross_entropy(output, target)

    online = trainer(net, loss_fn=loss_fn)
    with pytest.raises(interrupt):
        online.forward_backward(X, TARGET)
    assert oracle.gradients(net) == [None] * 6
    expected, _ = online_gradients(networks.conv_net(), X, TARGET)
    online.forward_backward(X, TARGET)
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6


@pytest.mark.parametrize("generator", [None, 3])
def test_steps_go_on_where_the_saved_trainer_left_off(generator):
    def new():
        given = None if generator is None else torch.Generator().manual_seed(generator)
        return trainer(networks.conv_net(), k=2, generator=given)

    def steps(online):
        return [online.forward_backward(X, TARGET).time_steps for _ in range(4)]

    online = new()
    steps(online)
    saved, random_state = online.state_dict(), torch.get_rng_state()
    expected = steps(online)
    online = new()
    steps(online)
    online.load_state_dict(saved)
    torch.set_rng_state(random_state)
    assert steps(online) == expected


def test_state_without_a_generator_for_a_trainer_with_one():
    saved = trainer(networks.conv_net(), k=2).state_dict()
    with pytest.raises(ConfigurationError, match="without generator="):
        trainer(networks.conv_net(), k=2, generator=torch.Generator()).load_state_dict(saved)


def test_a_trainer_goes_through_pickle_with_all_it_has_found_out():
    """As ``ddp_spawn`` and ``torch.multiprocessing`` send it."""
    online = trainer(networks.conv_net(), k=2, generator=torch.Generator().manual_seed(1))
    online.forward_backward(X, TARGET)
    sent = pickle.loads(pickle.dumps(online))
    found = [one.state_dict()["time-invariant"] for one in (online, sent)]
    assert found[0] == found[1]
    assert found[1]["proven"]
    steps = []
    for one in (online, sent):
        one.net.zero_grad()
        steps.append(one.forward_backward(X, TARGET).time_steps)
    assert steps[0] == steps[1]
    assert all(torch.equal(*pair) for pair in zip(oracle.gradients(online.net), oracle.gradients(sent.net)))
