"""OnlineTrainer and plain loops on whole snnTorch networks."""

import copy

import oracle
import pytest
import snntorch
import torch
import tutorials
from snntorch import functional as SF
from snntorch import spikegen
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.errors import ConfigurationError, InputError, SLTTWarning
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.snntorch import MultiStep, Stateful, step_loss

T, N = 6, 4


def batch(shape):
    generator = torch.Generator().manual_seed(3)
    x_seq = 2 * torch.rand(T, N, *shape, generator=generator)
    return x_seq, torch.randint(0, 5, (N,), generator=generator)


def spike(output):
    return output if isinstance(output, torch.Tensor) else output[0]


READ = {
    "spike": spike,
    "membrane": lambda output: output[1],
    lambda output: output[0] + output[1]: lambda output: output[0] + output[1],
}
NETWORKS = {
    "fully connected": (tutorials.fully_connected, (12,)),
    "convolutional": (tutorials.convolutional, (1, 12, 12)),
    "learned": (lambda: tutorials.convolutional(learn_beta=True, learn_threshold=True, reset_delay=False), (1, 12, 12)),
}  # fmt: skip


def expected_gradients(net, x_seq, target, read, steps=range(T)):
    def loss_of(output, t):
        weight = 1 / len(steps) if t in steps else 0
        return weight * F.cross_entropy(read(output), target)

    stepped, outputs = tutorials.stepping(net, x_seq, loss_of)
    return oracle.gradients(stepped), torch.stack([read(output) for output in outputs]).mean(0)


@pytest.mark.parametrize("output", READ, ids=["spike", "membrane", "function"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("chunk", [None, 1, 2, T], ids=lambda chunk: f"chunk={chunk}")
def test_gradients(name, output, chunk):
    make, shape = NETWORKS[name]
    net, (x_seq, target) = tutorials.strong(make()), batch(shape)
    gradients, mean = expected_gradients(net, x_seq, target, READ[output])
    sltt_ext.convert(net)
    run = net if chunk is None else MultiStep(net)
    online = sltt_ext.OnlineTrainer(run, F.cross_entropy, T, chunk=chunk or 1, time_dim=0, output=output)
    for _ in range(2):  # the second starts from a fresh state
        net.zero_grad()
        result = online.forward_backward(x_seq, target)
        assert oracle.relative_error(oracle.gradients(net), gradients) < 1e-6
        torch.testing.assert_close(result.output, mean)
    torch.testing.assert_close(online.predict(x_seq), mean)


@pytest.mark.parametrize("chunk", [None, 3])
def test_sltt_k(chunk):
    net, (x_seq, target) = tutorials.strong(tutorials.convolutional()), batch((1, 12, 12))
    gradients, _ = expected_gradients(net, x_seq, target, spike, steps=(1, 2, 5))
    run = sltt_ext.convert(net) if chunk is None else MultiStep(sltt_ext.convert(net))
    online = sltt_ext.OnlineTrainer(
        run,
        F.cross_entropy,
        T,
        chunk=chunk or 1,
        time_dim=0,
        schedule=lambda time_steps, generator: (1, 2, 5),
    )
    online.forward_backward(x_seq, target)
    assert oracle.relative_error(oracle.gradients(net), gradients) < 1e-6


@pytest.mark.parametrize("output", ["spike", "membrane"])
def test_states_passed(output):
    net, (x_seq, target) = tutorials.strong(tutorials.StatesPassed()), batch((12,))
    state = [None]

    def step(net, x, t):
        returned, state[0] = net(x, state[0] and tuple(mem.detach() for mem in state[0]))
        return returned

    def loss_of(returned, t):
        return F.cross_entropy(READ[output](returned), target) / T

    stepped, _ = tutorials.stepping(net, x_seq, loss_of, step)
    online = sltt_ext.OnlineTrainer(
        Stateful(sltt_ext.convert(net)), F.cross_entropy, T, time_dim=0, output=output
    )
    for _ in range(2):
        net.zero_grad()
        online.forward_backward(x_seq, target)
        assert oracle.relative_error(oracle.gradients(net), oracle.gradients(stepped)) < 1e-6


def test_another_interface_of_a_step():
    class Net(tutorials.StatesPassed):
        def forward(self, x, mem1=None, mem2=None):
            (spk, mem2), (mem1, _) = super().forward(x, None if mem1 is None else (mem1, mem2))
            return spk, mem1, mem2

    def step(net, x, state):
        spk, *state = net(x, *(state or ()))
        return spk, state

    torch.manual_seed(0)
    net = Net()
    own = copy.deepcopy(net)
    own.__class__ = tutorials.StatesPassed
    x_seq, target = batch((12,))
    for run in (Stateful(sltt_ext.convert(net), step), Stateful(sltt_ext.convert(own))):
        sltt_ext.OnlineTrainer(run, F.cross_entropy, T, time_dim=0).forward_backward(x_seq, target)
    assert all(torch.equal(*pair) for pair in zip(oracle.gradients(net), oracle.gradients(own)))


def test_the_state_is_constant_in_a_loop_of_ones_own():
    fc = nn.Linear(3, 3)

    def step(net, x, state):
        output = fc(x) + (0 if state is None else state)
        return output, output

    run, x = Stateful(fc, step), torch.rand(2, 3)
    sum(run(x).sum() for _ in range(3)).backward()
    assert torch.equal(fc.bias.grad, torch.full((3,), 6.0))  # 3 steps of 2 samples; 12 with the temporal part


def test_a_step_that_returns_no_pair():
    online = sltt_ext.OnlineTrainer(
        Stateful(sltt_ext.convert(tutorials.fully_connected()), lambda net, x, state: net(x)[0]),
        F.cross_entropy,
        T,
    )
    with pytest.raises(InputError, match=r"\(output, state\), as an RNN cell does"):
        online.forward_backward(torch.rand(N, 12), torch.arange(N))


def test_time_loop_inside_forward():
    """`convert` alone: one backward through the whole loop gives SLTT's gradient."""
    torch.manual_seed(0)
    net, x, target = tutorials.strong(tutorials.TimeLoopInside(T)), *batch((12,))
    x = x[0]

    def loss_of(spk, mem):
        return F.cross_entropy(spk, target) + F.mse_loss(mem, torch.ones_like(mem))

    expected = copy.deepcopy(net)
    mem1, mem2 = expected.lif1.init_leaky(), expected.lif2.init_leaky()
    for _ in range(T):
        spk1, mem1 = expected.lif1(expected.fc1(x), mem1.detach())
        spk2, mem2 = expected.lif2(expected.fc2(spk1), mem2.detach())
        loss_of(spk2, mem2).backward()

    bptt = copy.deepcopy(net)
    for run in (bptt, sltt_ext.convert(net)):
        spikes, potentials = run(x)
        sum(loss_of(spk, mem) for spk, mem in zip(spikes, potentials)).backward()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(expected)) < 1e-6
    assert oracle.relative_error(oracle.gradients(bptt), oracle.gradients(expected)) > 0.01


RUNS = {
    "init_hidden": lambda: sltt_ext.convert(tutorials.convolutional()),
    "states passed": lambda: Stateful(sltt_ext.convert(tutorials.StatesPassed())),
    "multi-step": lambda: MultiStep(sltt_ext.convert(tutorials.convolutional())),
    "generic": lambda: sltt_ext.convert(
        tutorials.fully_connected(snntorch.RLeaky, all_to_all=False, V=0.5, learn_beta=True)
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_memory_does_not_grow_with_time(name):
    net = RUNS[name]()
    x = torch.rand(8, 12) if name in ("states passed", "generic") else torch.rand(8, 1, 12, 12)
    target = torch.arange(8) % 5

    def peak(time_steps):
        online = sltt_ext.OnlineTrainer(net, F.cross_entropy, time_steps)
        online.forward_backward(x, target)
        return peak_activation_bytes(lambda: online.forward_backward(x, target), net)

    assert peak(32) <= 1.01 * peak(4)


LOSSES = {
    "ce_rate_loss": (SF.ce_rate_loss(), "spike"),
    "mse_membrane_loss": (SF.mse_membrane_loss(on_target=1.2, off_target=0.1), "membrane"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_snntorchs_losses_per_step(name):
    loss_fn, output = LOSSES[name]
    net, (x_seq, target) = tutorials.strong(tutorials.convolutional()), batch((1, 12, 12))
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), step_loss(loss_fn), T, time_dim=0, output=output)
    result = online.forward_backward(x_seq, target)
    gradients = oracle.gradients(net)
    net.zero_grad()
    snntorch.SpikingNeuron.instances[:] = [module for module in net if isinstance(module, snntorch.Leaky)]
    snntorch.Leaky.reset_hidden()
    recording = torch.stack([READ[output](net(x)) for x in x_seq])
    whole = loss_fn(recording, target)
    whole.backward()
    torch.testing.assert_close(result.loss, whole.detach().squeeze())
    assert oracle.relative_error(gradients, oracle.gradients(net)) < 1e-6
    assert SF.accuracy_rate(result.output.unsqueeze(0), target) == SF.accuracy_rate(recording, target)


@pytest.mark.parametrize(
    "loss_fn",
    [
        SF.ce_count_loss(),
        SF.ce_max_membrane_loss(),
        SF.mse_count_loss(),
        SF.mse_temporal_loss(),
        SF.mse_membrane_loss(time_var_targets=True),
        F.cross_entropy,
    ],
)
def test_losses_that_have_no_part_of_one_step(loss_fn):
    with pytest.raises(ConfigurationError, match="not a mean over time steps"):
        step_loss(loss_fn)


@pytest.mark.parametrize("code", ["rate", "latency", "stream"])
def test_spike_codes(code):
    x = torch.rand(N, 12, generator=torch.Generator().manual_seed(0))
    x_seq = (
        spikegen.rate(x, num_steps=T) if code == "rate" else spikegen.latency(x, num_steps=T, normalize=True)
    )
    net = sltt_ext.convert(tutorials.fully_connected())
    time_dim = None if code == "stream" else 0
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=time_dim, output="membrane")
    result = online.forward_backward(iter(x_seq) if code == "stream" else x_seq, torch.arange(N))
    assert result.output.shape == (N, 5)
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_chunks_need_the_multi_step_wrapper():
    net = sltt_ext.convert(tutorials.fully_connected())
    with pytest.raises(ConfigurationError, match=r"sltt_ext\.snntorch\.MultiStep\(net\)"):
        sltt_ext.OnlineTrainer(net, F.cross_entropy, T, chunk=2)


def test_a_state_carried_around_the_conversion_is_said():
    class Leaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif, self.trace = nn.Linear(12, 5), snntorch.Leaky(beta=0.9, init_hidden=True), [0]

        def forward(self, x):
            self.trace[0] = self.trace[0] + self.lif(self.fc(x))
            return self.trace[0]

    online = sltt_ext.OnlineTrainer(sltt_ext.convert(Leaking()), F.cross_entropy, T)
    with pytest.warns(SLTTWarning, match=r"trace: of a Leaking"):
        online.forward_backward(torch.rand(N, 12), torch.arange(N))
    assert online.net.fc.weight.grad.abs().sum() > 0


def test_compile():
    net = sltt_ext.convert(tutorials.fully_connected())
    x_seq, results = torch.rand(3, N, 12, generator=torch.Generator().manual_seed(0)), []
    torch._dynamo.reset()
    for run in (net, torch.compile(net, backend="aot_eager")):
        net.zero_grad()
        for module in net.modules():
            if isinstance(module, SLTTNeuron):
                module.reset_state()
        outputs = [run(x)[1] for x in x_seq]
        torch.stack(outputs).square().sum().backward()
        results.append((torch.stack(outputs).detach(), oracle.gradients(net)))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert oracle.relative_error(results[1][1], results[0][1]) < 1e-6


class OneStep(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif = nn.Linear(12, 5), snntorch.Leaky(beta=0.9, threshold=2.0)

    def forward(self, x, *, mem=None):
        _, mem = self.lif(self.fc(x), mem)
        return mem, mem


def test_a_stream_of_a_stateful_network():
    x_seq = torch.rand(6, N, 12)
    wanted = sltt_ext.over_time(Stateful(OneStep()), time_dim=0, returns="sequence")(x_seq)
    net = sltt_ext.over_time(Stateful(OneStep()), time_dim=0, returns="sequence", carry=True)
    for _ in range(2):
        torch.testing.assert_close(torch.cat([net(x_seq[:2]), net(x_seq[2:])]), wanted)
        for module in net.modules():  # as SpikingJelly's reset_net does
            if callable(getattr(module, "reset", None)):
                module.reset()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ([], "takes a torch.nn.Module"),
        (OneStep, "takes a torch.nn.Module"),
        (nn.Linear(2, 2), "takes no state"),
    ],
)
def test_what_stateful_does_not_take(net, message):
    with pytest.raises(ConfigurationError, match=message):
        Stateful(net)
