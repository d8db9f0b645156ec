"""What must not happen in the middle of an iteration."""

import networks
import oracle
import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, InputError, LossError

T = 4
X, TARGET = networks.images()


def trainer(net=None, loss_fn=F.cross_entropy, **options):
    net = networks.conv_net() if net is None else net
    return sltt_ext.OnlineTrainer(sltt_ext.convert(net), loss_fn, T, **options)


def untouched(net):
    """Whether nothing is half-done: gradients, states, weights."""
    weights = zip(net.parameters(), networks.conv_net().parameters(), strict=True)
    return (
        oracle.gradients(net) == [None] * 6
        and net[1].v == 0.0
        and all(torch.equal(*pair) for pair in weights)
    )


def in_on_step(inner):
    online = trainer(on_step=lambda t: inner(online.net))
    return online


def in_backward(inner):
    online = trainer(backward=lambda loss: (inner(online.net), loss.backward()))
    return online


def in_the_loss(inner):
    def loss_fn(output, target):
        inner(online.net)
        return F.cross_entropy(output, target)

    online = trainer(loss_fn=loss_fn)
    return online


@pytest.mark.parametrize("where", [in_on_step, in_backward, in_the_loss])
@pytest.mark.parametrize("how", ["predict", "forward_backward"])
def test_a_pass_in_the_middle_of_another(where, how):
    def inner(net):
        other = sltt_ext.OnlineTrainer(net, F.cross_entropy, T)
        return other.predict(X) if how == "predict" else other.forward_backward(X, TARGET)

    online = where(inner)
    with pytest.raises(ConfigurationError, match="another pass ran through the network in the middle"):
        online.forward_backward(X, TARGET)
    assert untouched(online.net)
    assert torch.equal(online.predict(X), trainer().predict(X))


@pytest.mark.parametrize("where", [in_on_step, in_backward, in_the_loss])
def test_a_pass_of_a_copy_in_the_middle(where):
    other = trainer()
    online = where(lambda net: other.predict(X))
    online.forward_backward(X, TARGET)
    expected = oracle.sltt_gradients(networks.conv_net(), [X] * T, TARGET, F.cross_entropy)
    assert oracle.relative_error(oracle.gradients(online.net), expected) < 1e-6


def stepping(net, **options):
    optimizer = torch.optim.SGD(net.parameters(), 0.1, **options)

    def backward(loss):
        loss.backward()
        optimizer.step()

    return backward


@pytest.mark.parametrize("fused", [False, True])
def test_a_backward_that_steps_the_optimizer(fused):
    net = networks.conv_net()
    with pytest.raises(
        LossError, match=r"SGD updates the network at a time step.*after forward_backward.*on_step="
    ):
        trainer(net, backward=stepping(net, fused=fused)).forward_backward(X, TARGET)
    assert untouched(net)


def test_an_optimizer_in_a_hook_on_the_gradient():
    net = networks.conv_net()
    optimizer = torch.optim.SGD([net[0].weight], 0.1)
    net[0].weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(LossError, match="SGD updates the network"):
        trainer(net, cache_invariant=False).forward_backward(X, TARGET)
    assert untouched(net)


def test_a_backward_that_steps_where_it_is_the_only_one():
    net, other = networks.conv_net(), networks.conv_net()
    trainer(net, schedule=lambda *_: [1], backward=stepping(net)).forward_backward(X, TARGET)
    trainer(other, schedule=lambda *_: [1]).forward_backward(X, TARGET)
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), other.parameters()))


def test_another_networks_optimizer_may_step():
    net, other = networks.conv_net(), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    trainer(net, backward=lambda loss: (loss.backward(), optimizer.step())).forward_backward(X, TARGET)
    expected = oracle.sltt_gradients(networks.conv_net(), [X] * T, TARGET, F.cross_entropy)
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6


def encoder():
    torch.manual_seed(3)
    return nn.Conv2d(1, 1, 3, padding=1)


def soft(y):
    return F.one_hot(y, 5).float() * torch.ones(5, requires_grad=True).exp()


WITH_GRAPH = {
    "x": (lambda: (encoder()(X).tanh(), TARGET), {}, "x has a graph"),
    "a sequence": (lambda: (encoder()(X).tanh().expand(T, *X.shape), TARGET), {"time_dim": 0}, "x has a graph"),
    "the target": (lambda: (X, soft(TARGET)), {}, "the target has a graph"),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_GRAPH)
def test_inputs_that_have_a_graph(name):
    give, options, message = WITH_GRAPH[name]
    online = trainer(**options)
    with pytest.raises(InputError, match=rf"{message}.*torch.no_grad\(\), or detach\(\)"):
        online.forward_backward(*give())
    assert untouched(online.net)


@pytest.mark.parametrize("loss_on", ["mean", "sequence"])
def test_one_loss_trains_what_is_in_front_and_in_the_loss(loss_on):
    """As one network, whose first and last layers belong to others."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, output, target):
            output = output if loss_on == "mean" else output.mean(0)
            return F.cross_entropy(self.factor * output, target) + 0.1 * net[0].weight.square().sum()

    net, first, loss_fn = networks.conv_net(), encoder(), Scaled()
    trainer(net, loss_fn=loss_fn, loss_on=loss_on).forward_backward(first(X).tanh(), TARGET)
    actual = [parameter.grad for part in (first, net, loss_fn) for parameter in part.parameters()]
    net, first, loss_fn = networks.conv_net(), encoder(), Scaled()
    outputs = []
    for _ in range(T):
        outputs.append(net(first(X).tanh()))
        functional.detach_net(net)
    mean = torch.stack(outputs)
    loss_fn(mean.mean(0) if loss_on == "mean" else mean, TARGET).backward()
    expected = [parameter.grad for part in (first, net, loss_fn) for parameter in part.parameters()]
    assert oracle.relative_error(actual, expected) < 1e-6


def test_frames_that_share_a_graph():
    with pytest.raises(LossError, match=r"share: detach\(\) them"):
        trainer().forward_backward(list(encoder()(X).tanh().expand(T, *X.shape).unbind()), TARGET)


def test_frames_with_a_graph_each():
    """As an encoder of every frame, run in a stream: its gradient is that of a first layer."""
    first = encoder()
    online = trainer()
    online.forward_backward((first(X).tanh() for _ in range(T)), TARGET)
    joined = nn.Sequential(encoder(), nn.Tanh(), *networks.conv_net())
    expected = oracle.sltt_gradients(joined, [X] * T, TARGET, F.cross_entropy)
    actual = [parameter.grad for parameter in first.parameters()] + oracle.gradients(online.net)
    assert oracle.relative_error(actual, expected) < 1e-6


def test_an_input_with_a_graph_in_one_call():
    """All steps in one call: there is one backward pass, and the encoder in front is trained as well."""
    first, net = encoder(), networks.conv_net()
    functional.set_step_mode(net, "m")
    trainer(net, chunk=T).forward_backward(first(X).tanh(), TARGET)
    joined = nn.Sequential(encoder(), nn.Tanh(), *networks.conv_net())
    expected = oracle.sltt_gradients(joined, [X] * T, TARGET, F.cross_entropy)
    actual = [parameter.grad for parameter in first.parameters()] + oracle.gradients(net)
    assert oracle.relative_error(actual, expected) < 1e-6
