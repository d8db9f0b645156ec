"""What is given as x: inputs of several tensors, and what is no input."""

import oracle
import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import InputError

T, N = 4, 3
GENERATOR = torch.Generator().manual_seed(2)
A, B = (2 * torch.rand(T, N, 6, generator=GENERATOR) for _ in range(2))
TARGET = torch.tensor([0, 2, 1])


class TwoInputs(nn.Module):
    def __init__(self, step_mode="s"):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
        self.node = neuron.LIFNode(step_mode=step_mode)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        a, b = (x["a"], x["b"]) if isinstance(x, dict) else x
        return self.head(self.node(self.a(a) + self.b(b)))


def as_dict(a, b):
    return {"a": a, "b": b}


def pair(a, b):
    return a, b


INPUTS = {
    "dicts": (lambda: [as_dict(*ab) for ab in zip(A, B)], None),
    "tuples": (lambda: [pair(*ab) for ab in zip(A, B)], None),
    "a stream of dicts": (lambda: (as_dict(*ab) for ab in zip(A, B)), None),
    "a dict, time first": (lambda: as_dict(A, B), 0),
    "a dict, batch first": (lambda: as_dict(A.transpose(0, 1), B.transpose(0, 1)), 1),
    "a dict at every step": (lambda: as_dict(A[0], B[0]), None),
}


@pytest.mark.parametrize(("step_mode", "chunk"), [("s", 1), ("m", 1), ("m", 3)])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_several_tensors(name, step_mode, chunk):
    give, time_dim = INPUTS[name]
    same = name == "a dict at every step"
    frames = [as_dict(A[0 if same else t], B[0 if same else t]) for t in range(T)]
    expected = oracle.sltt_gradients(TwoInputs(), frames, TARGET, F.cross_entropy)
    net = sltt_ext.convert(TwoInputs(step_mode))
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, chunk=chunk, time_dim=time_dim)
    for _ in range(2):
        net.zero_grad()
        online.forward_backward(give(), TARGET)
        assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6


def test_an_input_of_several_tensors_keeps_its_gradient_after_an_error():
    net = sltt_ext.convert(TwoInputs())
    calls = []

    def loss_fn(output, target):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    x = as_dict(A[0].clone().requires_grad_(), B[0])
    with pytest.raises(KeyboardInterrupt):
        sltt_ext.OnlineTrainer(net, loss_fn, T).forward_backward(x, TARGET)
    assert x["a"].grad is None


X = A[0]
NO_INPUTS = {
    "a batch": (5, None, "s", lambda: (X, TARGET), r"tuple of \[3, 6\], \[3\].*unpack a batch, forward_backward\(x, target\)"),
    "a batch, for two steps": (2, None, "s", lambda: [X, TARGET], r"\[3, 6\], \[3\].*unpack a batch"),
    "a batch of a dict, for two steps": (2, None, "s", lambda: (as_dict(X, X), TARGET), r"of dict, \[3\].*unpack a batch"),
    "a batch of equal shapes": (5, None, "s", lambda: (X, X), r"x has 2 frames.*unpack a batch"),
    "the other axis": (4, 0, "s", lambda: torch.rand(8, 4, 6), "8 steps along time_dim=0.*axis 1 has 4: is it time_dim=1"),
    "the other axis too": (4, 1, "s", lambda: torch.rand(4, 8, 6), "8 steps along time_dim=1.*axis 0 has 4: is it time_dim=0"),
    "numbers in a dict": (4, None, "s", lambda: {"a": X, "b": 3}, "tensors only.*int: choose"),
    "an empty tensor in a dict": (4, None, "s", lambda: as_dict(X, X[:0]), "x is empty"),
    "frames of other shapes": (4, None, "m", lambda: [A[t, : t + 1] for t in range(4)], "same shapes.*pad"),
    "frames of numbers": (4, None, "m", lambda: [1.0] * 4, "must be tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_INPUTS)
def test_what_is_no_input(name):
    time_steps, time_dim, step_mode, give, message = NO_INPUTS[name]
    net = sltt_ext.convert(TwoInputs(step_mode))
    online = sltt_ext.OnlineTrainer(
        net, F.cross_entropy, time_steps, time_dim=time_dim, chunk=2 if step_mode == "m" else 1
    )
    with pytest.raises(InputError, match=message):
        online.forward_backward(give(), TARGET)


class Named(torch.Tensor):
    """A user's subclass."""


KINDS = {
    "sparse": torch.Tensor.to_sparse,
    "compressed": torch.Tensor.to_sparse_csr,
    "a subclass": lambda x: x.as_subclass(Named),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_tensors(kind):
    def gradients(x):
        torch.manual_seed(0)
        net = sltt_ext.convert(nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(), nn.Linear(8, 5)))
        online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T)
        for _ in range(2):  # the second time, what is time-invariant is evaluated once
            net.zero_grad()
            online.forward_backward(x, TARGET)
        return oracle.gradients(net)

    assert oracle.relative_error(gradients(KINDS[kind](A[0])), gradients(A[0])) < 1e-6


@pytest.mark.parametrize(
    ("x", "step_mode"), [(A[0].to_sparse(), "m"), (torch.nested.nested_tensor([*A[0]]), "s")]
)
def test_tensors_that_are_not_dense(x, step_mode):
    net = sltt_ext.convert(nn.Sequential(nn.Linear(6, 5), neuron.LIFNode(step_mode=step_mode)))
    with pytest.raises(InputError, match=r"x must be a dense tensor: use x.to_dense\(\)"):
        sltt_ext.OnlineTrainer(net, F.cross_entropy, T).forward_backward(x, TARGET)


def test_weights_of_a_subclass():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(), nn.Linear(8, 5))
    expected = oracle.sltt_gradients(net, [A[0]] * T, TARGET, F.cross_entropy)
    net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(Named))
    sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T).forward_backward(A[0], TARGET)
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6
