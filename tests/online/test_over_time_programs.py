"""What a program does with a network over time: backward, hooks, random numbers, copies, bad options, errors."""

import copy
import pickle

import networks
import oracle
import pytest
import torch
from over_time_oracle import TARGET, T, TimeInside, X, gradients, original, random_net
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.errors import ConfigurationError, InputError, LossError, SLTTWarning


def test_gradients_go_through_autograd():
    """Hooks see one sum; ``autograd.grad`` gives, and leaves .grad alone; only what is asked for is computed."""
    net = sltt_ext.over_time(networks.conv_net(), T)
    calls = []
    net[0].weight.register_hook(lambda gradient: calls.append(1) or 2 * gradient)
    F.cross_entropy(net(X), TARGET).backward()
    doubled, weight = net[0].weight.grad, net[6].weight
    assert calls == [1]
    (asked,) = torch.autograd.grad(F.cross_entropy(net(X), TARGET), [weight])
    assert calls == [1]
    assert torch.allclose(asked, weight.grad, atol=1e-6)  # steps are added up in another order
    plain = sltt_ext.over_time(networks.conv_net(), T)
    F.cross_entropy(plain(X), TARGET).backward()
    assert torch.equal(doubled, 2 * plain[0].weight.grad)


def test_backward_again():
    net = sltt_ext.over_time(networks.conv_net(), T)
    loss = F.cross_entropy(net(X), TARGET)
    loss.backward(retain_graph=True)
    once = [gradient.clone() for gradient in gradients(net)]
    loss.backward()
    assert oracle.relative_error(gradients(net), [2 * gradient for gradient in once]) < 1e-7
    output = net(X)
    output.sum().backward()
    with pytest.raises(LossError, match="retain_graph=True the first time"):
        output.mean().backward()


def test_conditions_are_those_of_forward():
    """Modes, frozen weights and autocast, whatever they are at the time of backward."""
    reference, net = random_net(), sltt_ext.over_time(random_net(), T)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(original(reference, [X] * T).float().mean(0), TARGET).backward()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(X)
    net.eval()
    loss = F.cross_entropy(output.float(), TARGET)
    loss.backward()
    assert not net[3].training
    assert oracle.relative_error(gradients(net), gradients(reference)) < 3e-2


def test_numbers_from_other_generators_are_the_same_again():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(1)

        def forward(self, x):
            import random

            import numpy

            return x * (1 + random.random()) * (1 + numpy.random.rand()) + torch.rand(
                x.shape, generator=self.generator
            )

    torch.manual_seed(8)
    net = nn.Sequential(Noisy(), *networks.conv_net())
    seen = []
    net[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    sltt_ext.over_time(net, T, schedule=lambda *_: [1, 2, 4])
    output = net(X)
    first, seen[:] = list(seen), []
    output.sum().backward()
    assert all(torch.equal(first[t], again) for t, again in zip([1, 2, 4], seen, strict=True))


def test_other_random_numbers_are_said():
    generator = torch.Generator().manual_seed(1)
    net = networks.conv_net()
    net[2].register_forward_hook(
        lambda module, args, output: output + 5 * torch.rand(output.shape, generator=generator)
    )
    with pytest.warns(SLTTWarning, match="computes something else when its time steps run again"):
        sltt_ext.over_time(net, T)(X).sum().backward()


def test_what_hooks_gather_has_no_gradient_and_says_so():
    net, rates = sltt_ext.over_time(networks.conv_net(), T), []
    net[1].register_forward_hook(lambda module, args, output: rates.append(output.mean()))
    output = net(X)
    with pytest.raises(LossError, match="return it as a part of the output"):
        (F.cross_entropy(output, TARGET) + sum(rates)).backward()


def test_what_a_hook_has_of_the_last_step_has_no_gradient_either():
    """Its graph is kept, and starts from leaves of its own."""
    net, rates = sltt_ext.over_time(networks.conv_net(), T), {}
    net[1].register_forward_hook(lambda module, args, output: rates.update(last=output.mean()))
    for _ in range(3):
        F.cross_entropy(net(X), TARGET).backward()
    net(X)
    with pytest.raises(LossError, match="return it as a part of the output"):
        rates["last"].backward()
    with pytest.raises(RuntimeError, match="second time"):  # torch's: the graph is freed by then
        (net(X).sum() + rates["last"]).backward()


def test_an_attribute_computed_before_the_call_gets_its_gradient():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.factor = networks.conv_net(), None

        def forward(self, x):
            return self.net(self.factor * x)

    grads = []
    for over_time in (False, True):
        net, scale = Scaled(), nn.Parameter(torch.tensor(0.7))
        net.factor = scale.exp()
        mean = sltt_ext.over_time(net, T)(X) if over_time else original(net, [X] * T).mean(0)
        F.cross_entropy(mean, TARGET).backward()
        grads.append([scale.grad, *gradients(net)])
    assert oracle.relative_error(grads[1], grads[0]) < 1e-6


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    reference, net = random_net().eval(), sltt_ext.over_time(random_net(), T).eval()
    with context():
        output = net(X)
        assert torch.allclose(output, original(reference, [X] * T).mean(0), atol=1e-6)
    assert not output.requires_grad


def test_is_the_users_network_still():
    reference, net = networks.conv_net(), networks.conv_net()
    keys = list(net.state_dict())
    assert sltt_ext.over_time(net, T) is net
    assert isinstance(net, nn.Sequential)
    assert list(net.state_dict()) == keys
    assert net[0] is next(net.children())
    expected = net(X)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(copied(X), expected)
        copied(X).sum().backward()
        assert net[0].weight.grad is None
    calls = []
    net.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    net(X)
    assert calls == [(3, 5)]
    assert type(sltt_ext.revert(net)) is nn.Sequential
    assert type(net[1]) is neuron.LIFNode
    functional.reset_net(net)
    assert torch.equal(net(X), reference(X))


def test_what_is_made_by_its_class_does_not_run_over_time():
    net, reference = sltt_ext.over_time(networks.conv_net(), T), networks.conv_net()
    features = net[:1]
    assert type(features) is nn.Sequential
    assert torch.equal(features(X), reference[:1](X))
    assert type(net).__name__ == "Sequential"


def test_an_output_may_be_changed_in_place():
    reference, net = networks.conv_net(), sltt_ext.over_time(networks.conv_net(), T)
    F.cross_entropy(2 * original(reference, [X] * T).mean(0), TARGET).backward()
    output = net(X)
    output *= 2
    F.cross_entropy(output, TARGET).backward()
    assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-6


def test_moving_average_of_weights():
    net = sltt_ext.over_time(networks.conv_net(), T)
    average = torch.optim.swa_utils.AveragedModel(net)
    average.update_parameters(net)
    assert torch.equal(average(X), net(X))


def test_memory_does_not_grow_with_time():
    """At T = 1 no step has a state to start from."""
    peaks = []
    for time_steps in (1, 2, 32):
        net = sltt_ext.over_time(networks.conv_net(), time_steps)
        x = torch.rand(64, 1, 8, 8)
        for _ in range(2):
            net(x).sum().backward()
        peaks.append(peak_activation_bytes(lambda net=net, x=x: net(x).sum().backward(), net))
    states = 2 * 64 * 6 * 64 * 4  # bytes
    assert peaks[2] <= 1.01 * peaks[1]
    assert peaks[1] <= peaks[0] + 2 * states


def no_tensor(x):
    return "nothing"


BAD = {
    "no network": (lambda: sltt_ext.over_time(no_tensor, T), ConfigurationError, "takes a torch.nn.Module"),
    "no neurons": (lambda: sltt_ext.over_time(nn.Linear(2, 2), T), sltt_ext.ConversionError, "no spiking neuron"),
    "nothing of that name": (
        lambda: sltt_ext.over_time(TimeInside(), time_inside="steps"), ConfigurationError, "names no attribute",
    ),
    "another number": (
        lambda: sltt_ext.over_time(TimeInside(), time_inside="head.out_features")(X), ConfigurationError, "holds the number of steps|other outputs",
    ),
    "k": (lambda: sltt_ext.over_time(networks.conv_net(), T, k=T + 1), ConfigurationError, "k must be"),
    "k of an input": (
        lambda: sltt_ext.over_time(networks.conv_net(), time_dim=0, k=3)(X.expand(2, *X.shape)), ConfigurationError, "k must be",
    ),
    "no number of steps": (lambda: sltt_ext.over_time(networks.conv_net())(X), InputError, "give time_steps="),
    "steps": (
        lambda: sltt_ext.over_time(networks.conv_net(), T, time_dim=0)(X.expand(2, *X.shape)), InputError, "2 steps along",
    ),
    "name of an input": (
        lambda: sltt_ext.over_time(networks.conv_net(), time_dim={"y": 0})(X), ConfigurationError, "names y",
    ),
    "inside another": (
        lambda: sltt_ext.over_time(nn.Sequential(sltt_ext.over_time(networks.conv_net(), T)), T), ConfigurationError, "already",
    ),
    "a wrapper": (
        lambda: sltt_ext.over_time(nn.DataParallel(networks.conv_net()), T), ConfigurationError, "over_time first",
    ),
    "returns": (lambda: sltt_ext.over_time(networks.conv_net(), T, returns="all"), ConfigurationError, "returns must be"),
    "memory": (lambda: sltt_ext.over_time(networks.conv_net(), T, memory_budget="much"), ConfigurationError, "6GiB"),
    "lengths": (
        lambda: sltt_ext.over_time(networks.conv_net(), T)(X, lengths=[1, 2, 9]), InputError, "lengths must be",
    ),
    "lengths of a sequence": (
        lambda: sltt_ext.over_time(networks.conv_net(), T, returns="sequence")(X, lengths=[1, 2, 3]), InputError, "weigh them",
    ),
    "chunk": (lambda: sltt_ext.over_time(networks.conv_net(), T, chunk=2)(X), ConfigurationError, "multi-step"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


class Ends(nn.Module):
    """A network that returns something odd."""

    def __init__(self, returned):
        super().__init__()
        self.net, self.returned = networks.conv_net(), returned

    def forward(self, x):
        return self.returned(self.net(x))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (no_tensor, "without a tensor"),
        (lambda y: (y, y.argmax(1)), "has no mean over time, got float32, int64"),
    ],
)
def test_outputs_that_cannot_be(returned, message):
    with pytest.raises(LossError, match=message):
        sltt_ext.over_time(Ends(returned), T)(X)


def changed_weight(net, x):
    output = net(x)
    with torch.no_grad():
        net[0].weight.mul_(2)
    return output.sum()


def changed_input(net, x):
    output = net(x)
    x.mul_(2)
    return output.sum()


def added_hook(net, x):
    output = net(x)
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    return output.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_weight, "changed in place between forward and backward"),
        (changed_input, "changed in place between forward and backward"),
        (added_hook, "hooks of '0' were added or removed"),
    ],
)
def test_changes_between_forward_and_backward(change, message):
    net = sltt_ext.over_time(networks.conv_net(), T)
    loss = change(net, X.clone())
    with pytest.raises(LossError, match=message):
        loss.backward()
    assert gradients(net) == [None] * 6


def test_gradient_of_a_gradient():
    net = sltt_ext.over_time(networks.conv_net(), T)
    x = X.clone().requires_grad_()
    with pytest.raises(LossError, match="create_graph=True"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)


def test_an_exception_in_the_second_run_leaves_nothing():
    net, calls = networks.conv_net(), []
    net[4].register_forward_hook(lambda *_: calls.append(1) if len(calls) < T + 2 else 1 / 0)
    sltt_ext.over_time(net, T)
    output = net(X)
    state, weight = net[1].v.clone(), net[0].weight
    with pytest.raises(ZeroDivisionError):
        output.sum().backward()
    assert gradients(net) == [None] * 6
    assert torch.equal(net[1].v, state)
    assert net[0].weight is weight
    assert "forward" not in vars(net[1])


def test_surrogates_of_ones_own_and_other_dtypes():
    """Half precision as it comes: the output has the network's own dtype."""
    net = sltt_ext.over_time(networks.conv_net(surrogate_function=surrogate.ATan()).bfloat16(), T)
    output = net(X.bfloat16())
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert net[0].weight.grad.isfinite().all()


class TakesArrays(nn.Module):
    """As the networks of reinforcement learning do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), neuron.LIFNode(v_threshold=0.3))

    def forward(self, obs):
        return self.body(torch.as_tensor(obs))


def test_a_network_that_takes_arrays():
    x = torch.rand(T, 6)
    net = sltt_ext.over_time(TakesArrays(), T)
    assert torch.equal(net(x.numpy()), net(x))
    with pytest.raises(InputError, match=r"obs is a NumPy array, and over time: give a tensor"):
        sltt_ext.over_time(TakesArrays(), T, time_dim=0)(x.numpy())
