"""A network over time in several processes: the gradient of one process on the joined batch, synchronised once a backward."""

import functools

import networks
import oracle
import over_time_runs as runs
import processes
import pytest
import torch
from distributed_runs import T, batch
from torch.nn import functional as F

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.xdist_group("distributed"),
]
OPTIONS = {
    "SLTT": ({}, {}),
    "room for graphs": ({"memory_budget": "1GiB"}, {}),
    "chunks": ({"chunk": 2}, {}, "m"),
    "static graph": ({}, {"static_graph": True}),
    "unused": ({}, {"find_unused_parameters": True}),
    "views of buckets": ({}, {"gradient_as_bucket_view": True}),
    "compiled": ({}, {}, "s", True),
}
FIND = {"find": {"find_unused_parameters": True}, "static": {"static_graph": True}, "neither": {}}
CASES = {
    **{f"ddp, {name}": (runs.ddp, case) for name, case in OPTIONS.items()},
    **{f"views, {name}": (runs.two_views, (wrapper,)) for name, wrapper in FIND.items() if name != "static"},
    **{f"unused, {name}": (runs.unused, (wrapper,)) for name, wrapper in FIND.items()},
    "drawn, generator": (runs.drawn, (True,)),
    "drawn, default": (runs.drawn, (False,)),
    "accumulation": (runs.accumulation, ()),
    "part": (runs.part, ()),
    "norms": (runs.norms, ()),
    "carried": (runs.carried, ()),
}


@functools.cache
def results():
    return processes.run(2, CASES)


def original(net, x, selected=range(T)):
    """The mean over time of the original network; steps that are not selected are constants, T / K times the others."""
    steps = oracle.StepByStep(net, T).steps(x)
    mean = torch.stack([step.detach() for step in steps]).mean(0)
    return mean + sum(steps[t] - steps[t].detach() for t in selected) / len(selected)


def gradients(loss, *nets):
    loss.backward()
    return [parameter.grad for net in nets for parameter in net.parameters()]


@functools.cache
def expected():
    net = networks.conv_net()
    x, target = batch(0, 1)
    return gradients(F.cross_entropy(original(net, x), target), net)


@pytest.mark.parametrize("name", OPTIONS)
def test_ddp(name):
    for result in results()[f"ddp, {name}"]:
        assert oracle.relative_error(result["gradients"], expected()) < 1e-6
        assert result["reduced"] == 1  # the network fits in one bucket


@pytest.mark.parametrize("name", ["generator", "default"])
def test_all_processes_draw_the_steps_of_the_first(name):
    first, second = results()[f"drawn, {name}"]
    assert first["drawn"] == second["drawn"]
    assert len(set(map(tuple, first["drawn"]))) > 1
    generator = torch.Generator().manual_seed(5)
    if name == "generator":
        assert first["drawn"] == [torch.randperm(T, generator=generator)[:2].tolist() for _ in range(5)]
    net = networks.conv_net()
    x, target = batch(0, 1)
    whole = gradients(F.cross_entropy(original(net, x, first["drawn"][-1]), target), net)
    assert oracle.relative_error(first["gradients"], whole) < 1e-6


def test_accumulation_over_batches():
    net = networks.conv_net()
    for seed in range(3):
        x, target = batch(0, 1, seed)
        whole = gradients(F.cross_entropy(original(net, x), target), net)
    for result in results()["accumulation"]:
        assert oracle.relative_error(result["gradients"], whole) < 1e-6
        assert result["reduced"] == 1


@pytest.mark.parametrize("name", ["find", "neither"])
def test_two_forward_passes_before_one_backward(name):
    net = networks.conv_net()
    (x, target), (other, _) = batch(0, 1), batch(0, 1, seed=2)
    first, second = original(net, x), original(net, other)
    whole = gradients(F.cross_entropy(first, target) + F.mse_loss(first, second), net)
    for result in results()[f"views, {name}"]:
        assert oracle.relative_error(result["gradients"], whole) < 1e-6
        assert result["reduced"] == 1


@pytest.mark.parametrize("name", FIND)
def test_a_parameter_that_is_not_used(name):
    for result in results()[f"unused, {name}"]:
        assert oracle.relative_error(result["gradients"], expected()) < 1e-6
        assert all(gradient is None or not gradient.any() for gradient in result["unused"])


def test_a_part_of_the_wrapped_network():
    first, second = results()["part"]
    assert first["drawn"] == second["drawn"]
    net = runs.Surrounded(networks.conv_net())
    x, target = batch(0, 1)
    features = original(net.part, 3 * net.encoder(x).relu(), first["drawn"][0])
    whole = gradients(F.cross_entropy(net.head(features.tanh()), target), net)
    for result in (first, second):
        assert oracle.relative_error(result["gradients"], whole) < 1e-6
        assert result["reduced"] == 1


def mean_of_processes(net, loss_of):
    """What synchronised gradients are where processes do not see one batch: the mean of each one's."""
    parts = []
    for rank in range(2):
        net.zero_grad()
        parts.append([gradient.clone() for gradient in gradients(loss_of(rank), net)])
    return [sum(pair) / 2 for pair in zip(*parts)]


def test_batch_norms():
    net = runs.norm_net()

    def loss(rank):
        x, target = batch(rank, 2)
        return F.cross_entropy(original(net, x), target)

    whole = mean_of_processes(net, loss)
    first, second = results()["norms"]
    for result in (first, second):
        assert oracle.relative_error(result["gradients"], whole) < 1e-6
