"""A network over time in several processes: the gradient of one process on the joined batch, synchronised once a backward."""

import functools

import networks
import oracle
import over_time_runs as runs
import processes
import pytest
import torch
from distributed_runs import GROUPS, T, batch
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
SHARDS_ON_CPU = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
needs_sharding = pytest.mark.skipif(not SHARDS_ON_CPU, reason="fully_shard on the CPU needs torch 2.7")
BEFORE_AND_AFTER = [(how, before) for how in runs.SHARDED for before in (True, False)]
PARTS_AND_ROOT = "parts and root"
KEEPING = {"reshard_after_forward": False}
SHARDING = {
    **{f"fsdp, {how}, {before}": (runs.fsdp, (how, before, {}, {})) for how, before in BEFORE_AND_AFTER},
    "fsdp, keeping": (runs.fsdp, (PARTS_AND_ROOT, True, {}, KEEPING)),
    "fsdp, room for graphs": (runs.fsdp, (PARTS_AND_ROOT, False, {"memory_budget": "1GiB"}, {})),
    "fsdp, drawn": (runs.fsdp_drawn, (PARTS_AND_ROOT,)),
    "fsdp, mixed": (runs.fsdp_mixed, ()),
    **{f"fsdp, accumulation, {how}": (runs.fsdp_accumulation, (how,)) for how in runs.SHARDED},
    **{f"fsdp, views, {how}": (runs.fsdp_two_views, (how,)) for how in (PARTS_AND_ROOT, "root")},
    **{f"fsdp, part, {how}": (runs.fsdp_part, (how,)) for how in (PARTS_AND_ROOT, "root")},
    **{f"fsdp, crash, {how}": (runs.fsdp_crash, (how,)) for how in (PARTS_AND_ROOT, "parts")},
}
CASES = {
    **(SHARDING if SHARDS_ON_CPU else {}),
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


@functools.cache
def expected_of_three_batches():
    net = networks.conv_net()
    for seed in range(3):
        x, target = batch(0, 1, seed)
        whole = gradients(F.cross_entropy(original(net, x), target), net)
    return whole


def test_accumulation_over_batches():
    for result in results()["accumulation"]:
        assert oracle.relative_error(result["gradients"], expected_of_three_batches()) < 1e-6
        assert result["reduced"] == 1


@functools.cache
def expected_of_two_views():
    net = networks.conv_net()
    (x, target), (other, _) = batch(0, 1), batch(0, 1, seed=2)
    first, second = original(net, x), original(net, other)
    return gradients(F.cross_entropy(first, target) + F.mse_loss(first, second), net)


@pytest.mark.parametrize("name", ["find", "neither"])
def test_two_forward_passes_before_one_backward(name):
    for result in results()[f"views, {name}"]:
        assert oracle.relative_error(result["gradients"], expected_of_two_views()) < 1e-6
        assert result["reduced"] == 1


@pytest.mark.parametrize("name", FIND)
def test_a_parameter_that_is_not_used(name):
    for result in results()[f"unused, {name}"]:
        assert oracle.relative_error(result["gradients"], expected()) < 1e-6
        assert all(gradient is None or not gradient.any() for gradient in result["unused"])


def expected_of_a_part(selected=range(T)):
    net = runs.Surrounded(networks.conv_net())
    x, target = batch(0, 1)
    features = original(net.part, 3 * net.encoder(x).relu(), selected)
    return gradients(F.cross_entropy(net.head(features.tanh()), target), net)


def test_a_part_of_the_wrapped_network():
    first, second = results()["part"]
    assert first["drawn"] == second["drawn"]
    whole = expected_of_a_part(first["drawn"][0])
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


def test_each_process_carries_its_own_state():
    net = runs.leaky_net()

    def loss(rank):
        x, target = batch(rank, 2)
        net[2].reset_mem()
        for _ in range(2):
            steps = [step_of(net, 3 * x) for _ in range(T)]
        return F.cross_entropy(torch.stack(steps).mean(0), target)

    whole = mean_of_processes(net, loss)
    for result in results()["carried"]:
        assert oracle.relative_error(result["gradients"], whole) < 1e-6


def step_of(net, x):
    output = net(x)
    net[2].detach_hidden()
    return output


@functools.cache
def expected_after_two_updates():
    net = networks.conv_net()
    optimizer, (x, target) = torch.optim.SGD(net.parameters(), 0.05), batch(0, 1)
    for i in range(3):
        net.zero_grad()
        whole = gradients(F.cross_entropy(original(net, x), target), net)
        if i < 2:
            optimizer.step()
    return whole


GATHERED = {PARTS_AND_ROOT: 2 * GROUPS, "root": 1, "parts": 2 * GROUPS}
"""In forward and in backward; a root stays gathered in between, as ever."""


@needs_sharding
@pytest.mark.parametrize(("how", "before"), BEFORE_AND_AFTER)
def test_fully_shard(how, before):
    """Before over_time or after it: gathered and reduced as if the T steps were one."""
    for result in results()[f"fsdp, {how}, {before}"]:
        assert oracle.relative_error(result["gradients"], expected_after_two_updates()) < 1e-6
        reduced = 1 if how == "root" else GROUPS
        assert result["counts"] == {"_allgather_base_": GATHERED[how], "_reduce_scatter_base_": reduced}
        assert result["sharded"]
        assert result["settings"][0] == result["settings"][2]


@needs_sharding
@pytest.mark.parametrize(("name", "gathered"), [("keeping", GROUPS), ("room for graphs", 2 * GROUPS)])
def test_fully_shard_with_options(name, gathered):
    for result in results()[f"fsdp, {name}"]:
        assert oracle.relative_error(result["gradients"], expected_after_two_updates()) < 1e-6
        assert result["counts"]["_allgather_base_"] == gathered


@needs_sharding
def test_fully_shard_draws_the_same_steps_in_all_processes():
    first, second = results()["fsdp, drawn"]
    assert first["drawn"] == second["drawn"]
    net = networks.conv_net()
    x, target = batch(0, 1)
    whole = gradients(F.cross_entropy(original(net, x, first["drawn"][-1]), target), net)
    assert oracle.relative_error(first["gradients"], whole) < 1e-6


@needs_sharding
def test_fully_shard_in_mixed_precision():
    """As the original network in bfloat16; sums are rounded in another order."""
    net = runs.mixed_net().bfloat16()
    x, target = batch(0, 1)
    whole = gradients(F.cross_entropy(original(net, x.bfloat16()).float(), target), net)
    for result in results()["fsdp, mixed"]:
        assert result["dtype"] == torch.bfloat16
        assert oracle.relative_error(result["gradients"], whole) < 1e-2


EXPECTED = {
    "accumulation": expected_of_three_batches,
    "views": expected_of_two_views,
    "part": expected_of_a_part,
    "crash": expected,
}


@needs_sharding
@pytest.mark.parametrize("name", [name for name in SHARDING if name.split(", ")[1] in EXPECTED])
def test_fully_shard_in_other_scripts(name):
    """Gradients accumulate over batches; two calls before one backward; a part of a network; after an interrupt."""
    for result in results()[name]:
        assert oracle.relative_error(result["gradients"], EXPECTED[name.split(", ")[1]]()) < 1e-6
