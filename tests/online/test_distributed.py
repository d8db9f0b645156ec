"""Several processes give the gradient of one process on the joined batch, and synchronise it once."""

import functools

import distributed_runs as runs
import networks
import oracle
import processes
import pytest
import torch
from distributed_runs import T
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sltt_ext.errors import ConfigurationError

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.xdist_group("distributed"),  # one process tests them, and starts the others once
]
WORLD_SIZES = pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])

ALL = tuple(range(T))
SHARDS_ON_CPU = tuple(map(int, torch.__version__.split(".")[:2])) >= (
    2,
    7,
)  # torch 2.6's fully_shard needs CUDA
needs_sharding = pytest.mark.skipif(not SHARDS_ON_CPU, reason="fully_shard on the CPU needs torch 2.7")
OPTIONS = {
    "SLTT": {},
    "SLTT-2": {"k": 2},
    "SLTT-1, stops early": {"k": 1, "full_output": False},
    "mean": {"loss_on": "mean"},
    "mean, SLTT-2": {"loss_on": "mean", "k": 2},
}
COMPILED = {
    "compiled, s": ({}, "s"),
    "compiled, s, SLTT-2": ({"k": 2}, "s"),
    "compiled, m": ({"chunk": 3}, "m"),
}
GROUPED = {"SLTT-1": {"k": 1}, "auto": {"chunk": "auto"}, "auto, SLTT-2": {"chunk": "auto", "k": 2}}
PLANS = {"no budget": {}, "a budget": {"memory_budget": "1GiB"}}
WINDOWS = {"windows": {}, "one window": {"k": 1}, "windows, mean": {"loss_on": "mean"}}
BUFFERS = {"SLTT": {}, "one step": {"schedule": runs.second_step}, "mean": {"loss_on": "mean"}}
RESHARD = {"resharding": {"reshard_after_forward": True}, "keeping": {"reshard_after_forward": False}}
EQUAL = {
    **{f"ddp, {name}": (runs.ddp, (options,)) for name, options in OPTIONS.items()},
    **{
        f"fully_shard, {kind}, {name}": (runs.fsdp, (options, RESHARD[kind]))
        for name, options in OPTIONS.items()
        for kind in RESHARD
    },
}
OTHERS = {
    **{name: (runs.ddp, (*case, True)) for name, case in COMPILED.items()},
    **{f"ddp, m, {name}": (runs.ddp, (options, "m")) for name, options in GROUPED.items()},
    **{
        f"fully_shard, m, {name}": (runs.fsdp, (options, RESHARD["resharding"], "m"))
        for name, options in GROUPED.items()
    },
    **{
        f"{wrapper}, {name}": (runs.windows, (wrapper, options))
        for name, options in WINDOWS.items()
        for wrapper in runs.WRAPPERS
    },
    **{f"buffers, {name}": (runs.buffers, (options,)) for name, options in BUFFERS.items()},
    **{
        f"plans, {mode}, {name}": (runs.plans, (mode, options))
        for mode in "sm"
        for name, options in PLANS.items()
    },
    "early": (runs.ddp, ({"k": 2, "schedule": "early"},)),
    "default generator": (runs.default_generator, ()),
    "accumulation, no_sync": (runs.accumulation, (True,)),
    "accumulation, sync=False": (runs.accumulation, (False,)),
    "accumulation, fully_shard": (runs.fsdp_accumulation, ()),
    "updates": (runs.updates, ()),
    "crash, ddp": (runs.crash, ("ddp",)),
    "crash, fully_shard": (runs.crash, ("fully_shard",)),
}


@functools.cache
def results(world_size):
    cases = EQUAL if world_size == 4 else {**EQUAL, **OTHERS}
    if not SHARDS_ON_CPU:
        cases = {name: case for name, case in cases.items() if "fully_shard" not in name}
    return processes.run(world_size, cases)


def expected_gradients(options, steps, net=None, seed=1):
    x, target = runs.batch(0, 1, seed)
    net = networks.conv_net() if net is None else net
    gradients = oracle.sltt_gradients_of_mean if options.get("loss_on") == "mean" else oracle.sltt_gradients
    return gradients(net, [x] * T, target, F.cross_entropy, steps)


@WORLD_SIZES
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_ddp(name, world_size):
    for result in results(world_size)[f"ddp, {name}"]:
        expected = expected_gradients(OPTIONS[name], result["steps"][-1])
        assert oracle.relative_error(result["gradients"], expected) < 1e-6
        assert result["reduced"] == 1  # the network fits in one bucket


@needs_sharding
@WORLD_SIZES
@pytest.mark.parametrize("kind", sorted(RESHARD))
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_fully_shard(name, kind, world_size):
    for result in results(world_size)[f"fully_shard, {kind}, {name}"]:
        expected = expected_gradients(OPTIONS[name], result["steps"][-1])
        assert oracle.relative_error(result["gradients"], expected) < 1e-6
        assert result["counts"] == {"_allgather_base_": runs.GROUPS, "_reduce_scatter_base_": runs.GROUPS}
        assert result["sharded"]
        assert result["settings"][0] == result["settings"][1]


@pytest.mark.parametrize("mode", "sm")
@pytest.mark.parametrize("name", PLANS)
def test_all_processes_follow_the_same_plan(name, mode):
    """Whatever their clocks say, until one of them has to make room for larger inputs."""
    first, second = results(2)[f"plans, {mode}, {name}"]
    assert first["plans"][:28] == second["plans"][:28]
    assert "measuring" not in first["plans"][27]
    assert first["largest"] == second["largest"] == [1.0, 0.0]  # what each of them has room for
    assert oracle.relative_error(first["gradients"], expected_gradients({}, ALL)) < 1e-6


@pytest.mark.parametrize("name", sorted(COMPILED))
def test_compiled_ddp(name):
    for result in results(2)[name]:
        expected = expected_gradients({}, result["steps"][-1])
        assert oracle.relative_error(result["gradients"], expected) < 1e-6
        assert result["reduced"] == 1


@pytest.mark.parametrize("name", sorted(GROUPED))
@pytest.mark.parametrize("wrapper", ["ddp", pytest.param("fully_shard", marks=needs_sharding)])
def test_steps_share_calls(name, wrapper):
    """What a call needs is measured in the first two of the three iterations."""
    for result in results(2)[f"{wrapper}, m, {name}"]:
        expected = expected_gradients({}, result["steps"][-1])
        assert oracle.relative_error(result["gradients"], expected) < 1e-6


@pytest.mark.parametrize("name", sorted(WINDOWS))
@pytest.mark.parametrize("wrapper", ["ddp", pytest.param("fully_shard", marks=needs_sharding)])
def test_windows(name, wrapper):
    for result in results(2)[f"{wrapper}, {name}"]:
        options = {**WINDOWS[name], "k": None, "schedule": lambda *_, steps=result["steps"]: steps}
        alone = runs.trainer(runs.network_through_time(), chunk=2, **options)
        alone.forward_backward(*runs.batch(0, 1))
        assert oracle.relative_error(result["gradients"], runs.gradients(alone.net)) < 1e-6


@pytest.mark.parametrize(
    "kind", ["ddp, SLTT-2", pytest.param("fully_shard, keeping, SLTT-2", marks=needs_sharding)]
)
def test_all_processes_draw_the_steps_of_the_first_ones_generator(kind):
    alone = runs.trainer(runs.network(), k=2, generator=torch.Generator().manual_seed(5))
    for result in results(2)[kind]:
        assert result["steps"] == [alone.forward_backward(*runs.batch(0, 1)).time_steps for _ in range(3)]
        alone.generator.manual_seed(5)


def test_all_processes_count_a_step_as_often():
    generator = torch.Generator().manual_seed(5)
    alone = runs.trainer(runs.network(), k=2, schedule="early", generator=generator)
    steps = []
    for _ in range(3):
        alone.net.zero_grad()
        steps.append(alone.forward_backward(*runs.batch(0, 1)).time_steps)
    for result in results(2)["early"]:
        assert result["steps"] == steps
        assert oracle.relative_error(result["gradients"], runs.gradients(alone.net)) < 1e-6


def test_all_processes_draw_the_same_steps_from_the_default_generator():
    first, second = results(2)["default generator"]
    assert first == second
    assert len(set(first)) > 1


@pytest.mark.parametrize("how", ["no_sync", "sync=False", pytest.param("fully_shard", marks=needs_sharding)])
def test_accumulation_over_batches(how):
    parts = [expected_gradients({}, ALL, seed=seed) for seed in range(3)]
    expected = [sum(gradients) for gradients in zip(*parts)]
    for result in results(2)[f"accumulation, {how}"]:
        assert oracle.relative_error(result["gradients"], expected) < 1e-6
        assert result["rounds"] == 1


@pytest.mark.parametrize("name", sorted(BUFFERS))
def test_buffers_are_broadcast_once(name):
    assert results(2)[f"buffers, {name}"] == [[1, 1, 1]] * 2


def test_update_at_every_step_synchronises_every_step():
    first, second = results(2)["updates"]
    assert first["reduced"] == second["reduced"] == T
    assert all(torch.equal(*pair) for pair in zip(first["weights"], second["weights"]))


@pytest.mark.parametrize("wrapper", ["ddp", pytest.param("fully_shard", marks=needs_sharding)])
def test_after_a_crash_the_gradient_is_that_of_a_fresh_network(wrapper):
    expected = expected_gradients({}, ALL)
    for gradients in results(2)[f"crash, {wrapper}"]:
        assert oracle.relative_error(gradients, expected) < 1e-6


@pytest.mark.parametrize(
    ("step_mode", "options", "works"),
    [
        ("s", {}, False),
        ("m", {"chunk": 2}, False),
        ("m", {"chunk": T}, True),
        ("s", {"k": 1}, True),
        ("s", {"on_step": lambda t: None}, True),
    ],
    ids=["steps", "chunks", "sequence", "SLTT-1", "updates"],
)
def test_a_static_graph_is_back_propagated_once(tmp_path, step_mode, options, works):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = DistributedDataParallel(runs.network(step_mode), static_graph=True)
        online = runs.trainer(net, **options)
        if works:
            steps = online.forward_backward(*runs.batch(0, 1)).time_steps
            assert oracle.relative_error(runs.gradients(net), expected_gradients({}, steps)) < 1e-6
        else:
            with pytest.raises(ConfigurationError, match="leave static_graph out"):
                online.forward_backward(*runs.batch(0, 1))
    finally:
        distributed.destroy_process_group()
