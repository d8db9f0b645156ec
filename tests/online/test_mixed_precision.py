"""torch.autocast and torch.amp.GradScaler, against a loop written by hand."""

import copy

import networks
import oracle
import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn
from torch.nn import functional as F

import sltt_ext

T = 4
X, TARGET = networks.images()
OPTIONS = {"SLTT": {}, "SLTT-2": {"schedule": lambda *_: [1, 3]}, "mean": {"loss_on": "mean"}}
SELECTED = {"SLTT": range(T), "SLTT-2": (1, 3), "mean": range(T)}
DEVICES = [
    pytest.param("cpu", torch.bfloat16, id="cpu-bfloat16"),
    *(
        pytest.param(
            "cuda", dtype, id=f"cuda-{name}",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        )
        for name, dtype in {"float16": torch.float16, "bfloat16": torch.bfloat16}.items()
    ),
]  # fmt: skip


def autocast(device, dtype):
    return torch.autocast(device, dtype)


def by_hand(net, x, target, name, device, dtype):
    """Forward of each step under autocast, with nothing cached from step to step; backward outside."""
    sltt_ext.convert(net)
    outputs = []
    for t in range(T):
        with autocast(device, dtype), torch.set_grad_enabled(t in SELECTED[name]):
            outputs.append(net(x))
            loss = F.cross_entropy(outputs[-1], target)
        if name != "mean" and t in SELECTED[name]:
            (loss / len(SELECTED[name])).backward()
    if name == "mean":
        with autocast(device, dtype):
            loss = F.cross_entropy(torch.stack(outputs).float().mean(0), target)
        loss.backward()
    functional.reset_net(net)
    return oracle.gradients(net)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_autocast(name, device, dtype):
    net = networks.conv_net().to(device)
    x, target = X.to(device), TARGET.to(device)
    expected = by_hand(copy.deepcopy(net), x, target, name, device, dtype)
    online = sltt_ext.OnlineTrainer(
        sltt_ext.convert(net), F.cross_entropy, T, cache_invariant=False, **OPTIONS[name]
    )
    with autocast(device, dtype):
        result = online.forward_backward(x, target)
    assert all(gradient.dtype == torch.float32 for gradient in oracle.gradients(net))
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6
    assert result.output.dtype == torch.float32


def test_gradients_after_predict_in_the_same_autocast():
    """Weights that were cast without gradients must not be taken for constants."""
    net = networks.conv_net()
    expected = by_hand(copy.deepcopy(net), X, TARGET, "SLTT", "cpu", torch.bfloat16)
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, cache_invariant=False)
    with autocast("cpu", torch.bfloat16):
        online.predict(X)
        online.forward_backward(X, TARGET)
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6


def test_update_at_every_step_under_autocast():
    """The cast weights of a step must not be those from before its update."""
    net, reference = networks.conv_net(), networks.conv_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    update = lambda t: (optimizer.step(), optimizer.zero_grad())  # noqa: E731
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, on_step=update)
    with autocast("cpu", torch.bfloat16):
        online.forward_backward(X, TARGET)
    sltt_ext.convert(reference)
    by_hand_optimizer = torch.optim.SGD(reference.parameters(), 0.5)
    for _ in range(T):
        with autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(reference(X), TARGET)
        (loss / T).backward()
        by_hand_optimizer.step()
        by_hand_optimizer.zero_grad()
    assert oracle.relative_error(list(net.parameters()), list(reference.parameters())) < 1e-6


class Spoiled(nn.Module):
    """Adds inf or NaN to the output of one step."""

    def __init__(self, value):
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, x):
        self.calls += 1
        return x + self.value * x if self.calls == 3 else x


@pytest.mark.parametrize("loss_on", ["step", "mean"])
def test_grad_scaler(loss_on):
    """Each step's loss is scaled, one unscale at the end, and the update is that of the unscaled gradient."""
    net = networks.conv_net()
    reference = copy.deepcopy(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    online = sltt_ext.OnlineTrainer(
        sltt_ext.convert(net), F.cross_entropy, T, loss_on=loss_on,
        backward=lambda loss: scaler.scale(loss).backward(),
    )  # fmt: skip
    online.forward_backward(X, TARGET)
    scaler.unscale_(optimizer)
    plain = sltt_ext.OnlineTrainer(sltt_ext.convert(reference), F.cross_entropy, T, loss_on=loss_on)
    plain.forward_backward(X, TARGET)
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(reference)) < 1e-6
    scaler.step(optimizer)
    scaler.update()
    torch.optim.SGD(reference.parameters(), 0.1).step()
    assert oracle.relative_error(list(net.parameters()), list(reference.parameters())) < 1e-6
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("loss_on", ["step", "mean"])
def test_grad_scaler_skips_steps_that_are_not_finite(value, loss_on):
    net = networks.conv_net().append(Spoiled(value))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    online = sltt_ext.OnlineTrainer(
        sltt_ext.convert(net), F.cross_entropy, T, loss_on=loss_on,
        backward=lambda loss: scaler.scale(loss).backward(),
    )  # fmt: skip
    online.forward_backward(X, TARGET)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters()))
    assert scaler.get_scale() == 512.0
    optimizer.zero_grad()
    online.forward_backward(X, TARGET)
    scaler.step(optimizer)
    scaler.update()
    assert not any(torch.equal(*pair) for pair in zip(before, net.parameters()))
    assert scaler.get_scale() == 512.0


def test_what_gathers_at_a_cached_output_of_half_precision_is_summed_in_float32():
    """64 steps' gradients, added up in bfloat16, would be off by about a percent."""
    x, target = networks.images()
    results = []
    for cache_invariant in (True, False):
        net = sltt_ext.convert(networks.conv_net())
        online = sltt_ext.OnlineTrainer(net, F.cross_entropy, 64, cache_invariant=cache_invariant)
        with torch.autocast("cpu", torch.bfloat16):
            online.forward_backward(x, target)
        results.append(next(net.parameters()).grad)
    assert oracle.relative_error([results[0]], [results[1]]) < 5e-3
