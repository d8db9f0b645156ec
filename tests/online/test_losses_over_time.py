"""Losses of the mean output, targets that change with time, and updates at every step."""

import copy
import itertools

import networks
import oracle
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, InputError

T = 6
MODES = [("s", 1), ("m", 1), ("m", 3), ("m", T)]
X, TARGET = networks.images()


def trainer(net, time_steps=T, loss_fn=F.cross_entropy, **options):
    return sltt_ext.OnlineTrainer(sltt_ext.convert(net), loss_fn, time_steps, **options)


def online_gradients(net, x=X, target=TARGET, step_mode="s", **options):
    net = copy.deepcopy(net)
    functional.set_step_mode(net, step_mode)
    result = trainer(net, **options).forward_backward(x, target)
    return oracle.gradients(net), result, net


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("cls", [neuron.LIFNode, neuron.ParametricLIFNode, neuron.QIFNode])
def test_convert_alone_and_a_loss_of_the_mean_output(cls, step_mode):
    net = networks.conv_net(cls)
    expected = oracle.sltt_gradients_of_mean(net, [X] * T, TARGET, F.cross_entropy)
    functional.set_step_mode(sltt_ext.convert(net), step_mode)
    x_seq = X.expand(T, *X.shape)
    output_seq = net(x_seq) if step_mode == "m" else torch.stack([net(x) for x in x_seq])
    F.cross_entropy(output_seq.mean(0), TARGET).backward()
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6


@pytest.mark.parametrize(("step_mode", "chunk"), MODES)
@pytest.mark.parametrize("cls", [neuron.LIFNode, neuron.ParametricLIFNode, neuron.QIFNode])
def test_loss_on_the_mean_is_exact(cls, step_mode, chunk):
    net = networks.conv_net(cls)
    expected = oracle.sltt_gradients_of_mean(net, [X] * T, TARGET, F.cross_entropy)
    actual, result, _ = online_gradients(net, step_mode=step_mode, chunk=chunk, loss_on="mean")
    assert oracle.relative_error(actual, expected) < 1e-6
    mean = torch.stack([net(X) for _ in range(T)]).mean(0)
    torch.testing.assert_close(result.output, mean)
    torch.testing.assert_close(result.loss, F.cross_entropy(mean, TARGET))
    assert not result.loss.requires_grad
    assert not result.output.requires_grad


@pytest.mark.parametrize(("scale", "divisor"), [("mean", 2), ("paper", T)])
@pytest.mark.parametrize("full_output", [True, False])
def test_loss_on_the_mean_with_sltt_k(scale, divisor, full_output):
    net = networks.conv_net()
    actual, result, _ = online_gradients(net, k=2, scale=scale, loss_on="mean", full_output=full_output)
    steps = result.time_steps
    expected = oracle.sltt_gradients_of_mean(net, [X] * T, TARGET, F.cross_entropy, steps, divisor)
    assert oracle.relative_error(actual, expected) < 1e-6
    torch.testing.assert_close(result.output, torch.stack([net(X) for _ in range(T)]).mean(0))


def random_net():
    """Random masks of both kinds, of one step and of a whole sequence, and batch norm."""
    net = networks.conv_net()
    net.insert(2, layer.BatchNorm2d(6))
    net.insert(3, layer.Dropout(0.4))
    net.insert(4, nn.Dropout(0.3))
    return net


@pytest.mark.parametrize("k", [None, 2])
def test_both_passes_have_the_same_masks_and_change_statistics_once(k):
    net = random_net()
    reference = copy.deepcopy(net)
    torch.manual_seed(3)
    actual, result, online = online_gradients(
        net, k=k, loss_on="mean", generator=torch.Generator().manual_seed(1)
    )
    after = torch.rand(5)
    torch.manual_seed(3)
    outputs = [reference(X)]
    for _ in range(T - 1):
        functional.detach_net(reference)
        outputs.append(reference(X))
    assert torch.equal(torch.rand(5), after)
    assert [name for name, _ in reference.named_buffers()] != []
    for name, buffer in reference.named_buffers():
        assert torch.equal(dict(online.named_buffers())[name], buffer), name
    mean = torch.stack(outputs).mean(0)
    torch.testing.assert_close(result.output, mean)
    (gradient,) = torch.autograd.grad(F.cross_entropy(mean, TARGET), mean, retain_graph=True)
    for t in result.time_steps:
        outputs[t].backward(gradient / len(result.time_steps), retain_graph=True)
    assert oracle.relative_error(actual, oracle.gradients(reference)) < 1e-6


def test_state_kept_in_buffers():
    """snnTorch's membrane potentials are buffers, and come and go with the state."""
    snntorch = pytest.importorskip("snntorch")
    gradients = {}
    for loss_on in ("step", "mean"):
        torch.manual_seed(0)
        net = sltt_ext.convert(
            nn.Sequential(nn.Linear(4, 8), snntorch.Leaky(beta=0.9, init_hidden=True), nn.Linear(8, 3))
        )
        weight = torch.randn(5, 3)
        online = trainer(net, loss_fn=lambda output, weight: (output * weight).sum(), loss_on=loss_on)
        for _ in range(2):
            net.zero_grad()
            online.forward_backward(3 * torch.ones(5, 4), weight)
        gradients[loss_on] = oracle.gradients(net)
    assert oracle.relative_error(gradients["mean"], gradients["step"]) < 1e-6  # the loss is linear


def test_memory_of_a_loss_on_the_mean_does_not_grow_with_time():
    from sltt_ext.analysis import peak_activation_bytes

    peaks = []
    for time_steps in (2, 16):
        net = networks.conv_net()
        online = trainer(net, time_steps, loss_on="mean")
        peaks.append(peak_activation_bytes(lambda: online.forward_backward(X, TARGET), net))  # noqa: B023
    assert peaks[1] <= 1.05 * peaks[0]


def test_scaled_loss_on_the_mean():
    net = networks.conv_net()
    expected, *_ = online_gradients(net, loss_on="mean")
    scaled, *_ = online_gradients(net, loss_on="mean", backward=lambda loss: (8 * loss).backward())
    assert oracle.relative_error(scaled, [8 * gradient for gradient in expected]) < 1e-6


def test_list_of_frames_goes_through_twice_and_an_iterator_cannot():
    net = networks.conv_net()
    frames = list(2 * torch.rand(T, 3, 1, 8, 8))
    expected = oracle.sltt_gradients_of_mean(net, frames, TARGET, F.cross_entropy)
    actual, *_ = online_gradients(net, frames, loss_on="mean")
    assert oracle.relative_error(actual, expected) < 1e-6
    with pytest.raises(InputError, match="frames twice"):
        online_gradients(net, iter(frames), loss_on="mean")


@pytest.mark.parametrize("failing", [1, 2])
def test_a_crash_in_either_pass_leaves_nothing(failing):
    calls = itertools.count(1)

    class Failing(nn.Module):
        def forward(self, x):
            if next(calls) == failing * T:
                raise torch.cuda.OutOfMemoryError
            return x

    expected, *_ = online_gradients(networks.conv_net(), loss_on="mean")
    net = networks.conv_net().append(Failing())
    online = trainer(net, loss_on="mean")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        online.forward_backward(X, TARGET)
    assert oracle.gradients(net) == [None] * 6
    online.forward_backward(X, TARGET)
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6


@pytest.mark.parametrize("selected", [(1,), (0, 3), (4, 5)])
def test_some_steps_of_a_list_of_frames(selected):
    """Those that run again are shown their own frames."""
    frames = list(2 * torch.rand(T, *X.shape))
    net = networks.conv_net()
    online = trainer(net, schedule=lambda *_: selected, loss_on="mean")
    online.forward_backward(frames, TARGET)
    expected = oracle.sltt_gradients_of_mean(
        networks.conv_net(), frames, TARGET, F.cross_entropy, selected, len(selected)
    )
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6


def test_random_numbers_are_not_left_rewound_by_a_crash():
    net = random_net()

    def interrupt(loss):
        raise KeyboardInterrupt

    online = trainer(net, loss_on="mean", backward=interrupt)
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        online.forward_backward(X, TARGET)
    after = torch.rand(5)
    torch.manual_seed(3)
    assert not torch.equal(torch.rand(5), after)


@pytest.mark.parametrize(("step_mode", "chunk"), MODES)
@pytest.mark.parametrize("target_time_dim", [0, 1])
def test_targets_that_change_with_time(step_mode, chunk, target_time_dim):
    net = networks.conv_net()
    targets = torch.randint(0, 5, (T, 3))
    reference = copy.deepcopy(net)
    for target in targets:
        (F.cross_entropy(reference(X), target) / T).backward()
        functional.detach_net(reference)
    given = targets if target_time_dim == 0 else targets.T
    actual, *_ = online_gradients(
        net, target=given, step_mode=step_mode, chunk=chunk, target_time_dim=target_time_dim
    )
    assert oracle.relative_error(actual, oracle.gradients(reference)) < 1e-6


@pytest.mark.parametrize("k", [None, 2])
def test_update_at_every_step(k):
    net = networks.conv_net()
    reference = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    seen = []

    def update(t):
        seen.append(t)
        optimizer.step()
        optimizer.zero_grad()

    result = trainer(net, k=k, on_step=update).forward_backward(X, TARGET)
    assert tuple(seen) == result.time_steps
    optimizer = torch.optim.SGD(reference.parameters(), 0.1)
    for t in range(T):
        loss = F.cross_entropy(reference(X), TARGET) / len(seen)
        if t in seen:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        functional.detach_net(reference)
    weights = [list(module.parameters()) for module in (net, reference)]
    assert oracle.relative_error(*weights) < 1e-6


BAD_OPTIONS = {
    "loss_on": ({"loss_on": "sum"}, "loss_on must be 'step', 'mean' or 'sequence'"),
    "target_time_dim": ({"target_time_dim": 2}, "target_time_dim must be None, 0 or 1"),
    "targets of a mean": ({"loss_on": "mean", "target_time_dim": 0}, "one loss for all steps"),
    "updates of a mean": ({"loss_on": "mean", "on_step": print}, "one loss for all steps"),
}


@pytest.mark.parametrize("case", sorted(BAD_OPTIONS))
def test_bad_options(case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ConfigurationError, match=message):
        trainer(networks.conv_net(), **options)


@pytest.mark.parametrize("target", [TARGET, torch.zeros(T + 1, 3), 1], ids=["batch", "longer", "number"])
def test_targets_of_another_length(target):
    with pytest.raises(InputError, match="6 steps along target_time_dim=0"):
        trainer(networks.conv_net(), target_time_dim=0).forward_backward(X, target)


class ChangesItsInput(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.sub_(0.5))


@pytest.mark.parametrize("time_dim", [None, 0])
def test_an_input_that_would_be_another_one_in_the_second_pass(time_dim):
    x, target = networks.images()
    net = ChangesItsInput(sltt_ext.convert(networks.conv_net()))
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, 3, loss_on="mean", time_dim=time_dim)
    with pytest.raises(InputError, match="out of place"):
        online.forward_backward(x if time_dim is None else torch.stack([x] * 3), target)
