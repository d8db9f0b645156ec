"""Losses of several outputs."""

import oracle
import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import gradient_similarity
from sltt_ext.bptt import BPTTTrainer
from sltt_ext.errors import LossError

T = 4
GENERATOR = torch.Generator().manual_seed(2)
X = 2 * torch.rand(T, 3, 6, generator=GENERATOR)
TARGET = torch.tensor([0, 2, 1])


class Heads(nn.Module):
    def __init__(self, step_mode="s", hold=lambda a, b: {"classes": a, "position": (b,)}):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(step_mode=step_mode))
        self.classes, self.position = nn.Linear(8, 5), nn.Linear(8, 2)
        self.hold = hold

    def forward(self, x):
        h = self.body(x)
        return self.hold(self.classes(h), self.position(h))


def loss_of(classes, position, target):
    return F.cross_entropy(classes, target) + position.pow(2).mean()


def loss_fn(outputs, target):
    return loss_of(outputs["classes"], outputs["position"][0], target)


def joined(a, b):
    return torch.cat([a, b], -1)


def loss_of_joined(output, target):
    return loss_of(output[..., :5], output[..., 5:], target)


def everything(returned):
    return returned


@pytest.mark.parametrize("loss_on", ["step", "mean"])
@pytest.mark.parametrize(("step_mode", "chunk"), [("s", 1), ("m", 3)])
def test_gradients_are_those_of_the_heads_in_one_tensor(step_mode, chunk, loss_on):
    gradients = oracle.sltt_gradients_of_mean if loss_on == "mean" else oracle.sltt_gradients
    expected = gradients(Heads(hold=joined), list(X), TARGET, loss_of_joined)
    net = sltt_ext.convert(Heads(step_mode))
    online = sltt_ext.OnlineTrainer(
        net, loss_fn, T, chunk=chunk, time_dim=0, output=everything, loss_on=loss_on
    )
    result = online.forward_backward(X, TARGET)
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6
    single = Heads()
    outputs = [single(x) for x in X]
    mean = torch.stack([output["position"][0] for output in outputs]).mean(0)
    torch.testing.assert_close(result.output["position"][0], mean)
    torch.testing.assert_close(online.predict(X), result.output)
    assert not any(tensor.requires_grad for tensor in (result.output["classes"], *result.output["position"]))


def test_a_head_that_a_loss_of_the_mean_does_not_read():
    net = sltt_ext.convert(Heads(hold=lambda a, b: [a, b]))
    online = sltt_ext.OnlineTrainer(
        net,
        lambda outputs, y: F.cross_entropy(outputs[0], y),
        T,
        time_dim=0,
        output=everything,
        loss_on="mean",
    )
    online.forward_backward(X, TARGET)
    expected = oracle.sltt_gradients_of_mean(
        Heads(hold=joined), list(X), TARGET, lambda output, y: F.cross_entropy(output[:, :5], y)
    )
    assert oracle.relative_error(oracle.gradients(net)[:4], expected[:4]) < 1e-6
    assert net.position.weight.grad is None


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_bptt(step_mode):
    net = Heads()
    loss = sum(loss_fn(net(x), TARGET) for x in X) / T
    loss.backward()
    other = Heads(step_mode)
    result = BPTTTrainer(other, loss_fn, T, time_dim=0, output=everything).forward_backward(X, TARGET)
    assert oracle.relative_error(oracle.gradients(other), oracle.gradients(net)) < 1e-6
    assert result.output["classes"].shape == (3, 5)


def test_similarity():
    similarity = gradient_similarity(
        sltt_ext.convert(Heads()), X, TARGET, loss_fn, T, time_dim=0, output=everything
    )
    assert similarity.output_difference < 1e-6


@pytest.mark.parametrize(
    "output", [None, lambda returned: {}, lambda returned: {"o": 1.0}], ids=["None", "empty", "a number"]
)
def test_what_is_no_output(output):
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(Heads()), loss_fn, T, time_dim=0, output=output)
    with pytest.raises(LossError, match=r"is a dict, not a tensor: choose .* output=.*several tensors"):
        online.forward_backward(X, TARGET)
