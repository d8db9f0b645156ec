"""Memory that runs out while a plan is tried: the iteration is taken back, and runs again with less."""

import networks
import pytest
import torch
from planned import PLAIN, T, normed, trained
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import SLTTWarning

TRIED = []  # not kept by the network, which would be seen


class Limited(nn.Module):
    """Memory runs out where a call has more steps than there is room for, in its forward or in its backward."""

    def __init__(self, most, where):
        super().__init__()
        self.most, self.where = most, where

    def forward(self, x_seq):
        TRIED.append(len(x_seq))
        return RunsOut.apply(x_seq, self.most, self.where)


class RunsOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_seq, most, where):
        ctx.runs_out = len(x_seq) > most
        if ctx.runs_out and where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x_seq.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.runs_out:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return grad, None, None


def limited(most, where):
    net = normed("m")
    net.insert(6, Limited(most, where))
    return net


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("options", [{}, {"loss_on": "mean"}, {"memory_budget": "8GiB"}], ids=str)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_memory_that_runs_out_while_a_plan_is_tried(most, where, options):
    TRIED.clear()
    with pytest.warns(SLTTWarning, match="memory ran out while a plan was tried, with . of 4 steps") as said:
        found, online = trained(limited(most, where), **options)
    assert online.plan.chunk <= most
    assert max(TRIED) > most
    TRIED.clear()
    for _ in range(3):
        online.forward_backward(*networks.images(4))
    assert max(TRIED) <= most
    assert len(said) <= 2
    plain, _ = trained(normed("m"), len(found), **{**PLAIN, **options, "memory_budget": None})
    for own, wanted in zip(found, plain, strict=True):
        for pair in zip(own, wanted, strict=True):
            torch.testing.assert_close(
                *pair, rtol=1e-5, atol=1e-6
            )  # of a bias before a norm, rounding is left


@pytest.mark.usefixtures("clock")
def test_memory_that_runs_out_otherwise_is_an_error():
    _, online = trained(limited(T, "forward"))
    online.net[6].most = 0
    with pytest.raises(torch.OutOfMemoryError):
        online.forward_backward(*networks.images(4))
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(limited(1, "forward")), F.cross_entropy, T)
    images, target = networks.images(4)
    for _ in range(4):
        if online._planner.tries_long_calls:
            break
        online.forward_backward(images, target)
    with pytest.raises(torch.OutOfMemoryError):  # frames are there once
        online.forward_backward(iter([images] * T), target)


@pytest.mark.usefixtures("clock")
def test_the_same_steps_are_drawn_where_memory_runs_out():
    def drawn(net, **options):
        online = sltt_ext.OnlineTrainer(
            sltt_ext.convert(net),
            F.cross_entropy,
            T,
            3,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        return [online.forward_backward(*networks.images(4)).time_steps for _ in range(20)]

    with pytest.warns(SLTTWarning, match="memory ran out"):
        found = drawn(limited(1, "forward"))
    assert found == drawn(normed("m"), **PLAIN)


class Counting(nn.Module):
    """A loss that keeps something."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output, target):
        self.calls += len(target) / 4
        return F.cross_entropy(output, target)


@pytest.mark.usefixtures("clock")
def test_what_a_loss_keeps_is_taken_back():
    loss_fn = Counting()
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(limited(1, "backward")), loss_fn, T)

    def train():
        for _ in range(6):
            online.forward_backward(*networks.images(4))

    with pytest.warns(SLTTWarning, match="memory ran out"):
        train()
    assert loss_fn.calls == 6 * T
