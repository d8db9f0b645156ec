import copy
import csv
import itertools
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import memory_tasks
import networks as small_networks
import networks_in_one_call
import oracle
import pytest
import step_norms
import torch
from peers import claims, measurements, tables
from peers.contenders import contenders
from peers.networks import CLASSES, Network, alive, networks, spikformer
from peers.rate_based import RateLIFNode, _RateNorm, rate_gradients
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import sltt_ext
from sltt_ext.models.nf_resnet import BasicBlock, NFResNet
from sltt_ext.models.preact_resnet import PreActResNet
from sltt_ext.models.vgg import VGG

ROOT = Path(__file__).parents[1]
T = 3

TINY = [
    Network(
        "NF-ResNet",
        lambda maker: NFResNet(BasicBlock, [1, 1, 1, 1], CLASSES, neuron=maker, width=8),
        (3, 64, 64),
        2,
        spread=3.0,
    ),
    Network(
        "pre-activation ResNet",
        lambda maker: PreActResNet([1, 1, 1, 1], CLASSES, neuron=maker, width=4),
        (3, 32, 32),
        2,
    ),
    Network(
        "VGG",
        lambda maker: VGG([1, 1, 1, 1, 1], CLASSES, neuron=maker, width=4),
        (2, 32, 32),
        2,
        sequence=True,
        blocks=lambda net: (nn.Sequential,),
    ),
]
if len(networks()) == 4:
    TINY.append(
        Network(
            "Spikformer",
            lambda maker: spikformer(maker, embed_dims=32, num_heads=4, depths=1),
            (3, 32, 32),
            2,
            single_step=False,
            blocks=networks()[-1].blocks,
        )
    )


def by_claim(exact):
    return [
        pytest.param(network, contender, id=f"{network.name}: {contender.name}")
        for network in TINY
        for contender in contenders(network)
        if contender.exact == exact
    ]


@cache
def weights(network):
    """Weights and, of the very batch, batch-norm statistics, with which neurons fire in all layers."""
    net = network.build(step_mode="m")
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    net(network.task(T).x_seq)
    return net.state_dict()


def frozen(network, net):
    net.load_state_dict(weights(network))
    return small_networks.freeze_batch_norm(net)


def gradients(network, contender, selected):
    task = network.task(T)
    net = frozen(network, contender.prepare(task))
    contender.iterate(net, task, selected)
    return oracle.gradients(net)


def with_oracle(network, selected, detach):
    """The network's own time loop over the whole sequence, with SpikingJelly's neurons."""
    task = network.task(T)
    net = frozen(network, network.build(step_mode="m"))
    output_seq = (oracle.detach_on_entry(net) if detach else net)(task.x_seq)
    task.mean_loss(output_seq[list(selected)]).backward()
    return oracle.gradients(net)


@pytest.mark.parametrize(("network", "contender"), by_claim(exact=True))
@pytest.mark.slow
def test_who_claims_sltts_gradient_has_it(network, contender):
    selected = {None: (0, 1, 2), 2: (0, 1), 1: (1,)}[contender.k]
    expected = with_oracle(network, selected, detach=True)
    assert oracle.relative_error(gradients(network, contender, selected), expected) < 1e-5


@pytest.mark.parametrize(
    ("network", "contender"), [case for case in by_claim(exact=False) if case.values[1].method == "BPTT"]
)
def test_every_bptt_has_the_gradient_of_bptt(network, contender):
    expected = with_oracle(network, (0, 1, 2), detach=False)
    assert oracle.relative_error(gradients(network, contender, ()), expected) < 1e-5


@pytest.mark.parametrize("network", TINY, ids=lambda network: network.name)
def test_the_gradient_reaches_every_layer(network):
    largest = [gradient.abs().max() for gradient in with_oracle(network, (0, 1, 2), detach=True)]
    assert min(largest) > 1e-4 * max(largest)


def rate_and_trace(x_seq, detach_reset):
    """Mean spikes of SpikingJelly's neuron, and their derivative to a constant at every step, through time."""
    node = neuron.LIFNode(
        tau=1.5, decay_input=False, v_reset=None, detach_reset=detach_reset,
        surrogate_function=surrogate.PiecewiseQuadratic(), step_mode="m",
    )  # fmt: skip
    constant = torch.zeros_like(x_seq[0], requires_grad=True)
    spikes = node(x_seq.detach() + constant)
    (trace,) = torch.autograd.grad(spikes.mean(0).sum(), constant)
    return spikes.detach(), spikes.mean(0).detach(), trace


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("detach_reset", [True, False])
def test_the_rate_based_gradient_is_the_papers_formula(detach_reset, chunk):
    torch.manual_seed(0)
    node = partial(RateLIFNode, 1.5, detach_reset=detach_reset)
    first, second, third = (layer.Linear(6, 6), layer.Linear(6, 6), layer.Linear(6, CLASSES))
    net = nn.Sequential(first, node(), second, node(), third)
    functional.set_step_mode(net, "m")
    for linear in (first, second):
        nn.init.normal_(linear.weight)
    network = Network("linear", lambda maker: net, (6, 1, 1), 4, sequence=True)
    task = network.task(5)
    task = type(task)(network, 2 * task.x.flatten(2), task.target, 5)
    rate_gradients(net, task.x_seq, task.loss, chunk)

    with torch.no_grad():
        s1, r1, e1 = rate_and_trace_of(first(task.x), detach_reset)
        _, r2, e2 = rate_and_trace_of(second(s1), detach_reset)
        error3 = (third(r2.unsqueeze(0))[0].softmax(1) - nn.functional.one_hot(task.target, CLASSES)) / 4
        error2 = error3 @ third.weight * e2
        error1 = error2 @ second.weight * e1
    expected = []
    for error, rate in ((error1, task.x.mean(0)), (error2, r1), (error3, r2)):
        expected += [error.T @ rate, error.sum(0)]
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-5


@torch.enable_grad()
def rate_and_trace_of(x_seq, detach_reset):
    return rate_and_trace(x_seq, detach_reset)


def test_batch_norm_of_rates_differentiates_through_its_statistics():
    torch.manual_seed(0)
    x, weight, bias = (
        tensor.double().requires_grad_() for tensor in (torch.randn(2, 3, 4, 4), torch.rand(3), torch.rand(3))
    )
    over, mean, variance = (0, 2, 3), x.mean((0, 2, 3)).detach(), torch.rand(3).double() + 0.5
    own_mean = x.mean(over)
    own_mean = (mean + own_mean - own_mean.detach())[:, None, None]
    own_variance = ((x - own_mean) ** 2).mean(over)
    own_variance = (variance + own_variance - own_variance.detach())[:, None, None]
    expected = weight[:, None, None] * (x - own_mean) / own_variance.sqrt() + bias[:, None, None]
    actual = _RateNorm.apply(x, weight, bias, mean, variance.rsqrt())
    downstream = torch.randn_like(expected)
    leaves = (x, weight, bias)
    assert torch.allclose(actual, expected)
    assert (
        oracle.relative_error(
            list(torch.autograd.grad(actual, leaves, downstream)),
            list(torch.autograd.grad(expected, leaves, downstream)),
        )
        < 1e-9
    )


def test_six_repetitions_of_one_step_have_every_step_once():
    assert sorted(measurements.draws(6, 1, 6)) == [(t,) for t in range(6)]


@pytest.mark.parametrize("repeats", [1, 3, 6, 20])
def test_draws_are_different_steps_in_order(repeats):
    drawn = measurements.draws(6, 2, repeats)
    assert len(drawn) == repeats
    assert set(drawn) <= set(itertools.combinations(range(6), 2))


@pytest.mark.parametrize(
    ("network", "dtype"),
    [(TINY[0], "float32"), *((network, "bfloat16") for network in TINY)],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.slow
def test_an_iteration_of_every_contender_is_measured(network, dtype):
    calls = []
    rows = measurements.iterations(network, dtype, 1, lambda: calls.append(1))
    assert len(calls) == measurements.number_of_iterations(network, dtype, 1)
    assert all(row["seconds"] > 0 and row["peak_mb"] > 0 for row in rows)


@pytest.mark.slow
def test_memory_and_seconds_over_time_are_measured(monkeypatch):
    monkeypatch.setattr(measurements, "TIMED", TINY[1])
    monkeypatch.setattr(measurements, "COUNTED", TINY[1])
    calls = []
    rows = measurements.over_time(1, lambda: calls.append(1), (1, 4))
    peaks = {(row["contender"], row["time_steps"]): row["peak_mb"] for row in rows}
    assert len(calls) == measurements.number_over_time(1, (1, 4))
    assert peaks["BPTT, steps", 4] > 2 * peaks["SLTT, SpikingJelly", 4]


@pytest.mark.slow
def test_memory_of_real_and_fake_tensors_is_the_same(monkeypatch):
    monkeypatch.setattr(measurements, "MEMORY", ((TINY[1], False), (TINY[1], True)))
    peaks = {}
    for row in measurements.memory(lambda: None):
        peaks.setdefault(row["contender"], []).append(row["peak_gib"])
    assert all(len(set(values)) == 1 for name, values in peaks.items() if name != "BPTT, memopt")


def test_the_gains_that_start_at_zero_are_alive():
    net = alive(NFResNet(BasicBlock, [1], CLASSES, width=4))
    zeros = [name for name, parameter in net.named_parameters() if not parameter.any()]
    assert all(name.endswith(("bias", "bias.original")) for name in zeros)


OVER_TIME = [
    {"contender": contender, "time_steps": time_steps, "peak_mb": peak}
    for contender, peaks in {
        "BPTT, steps": ("40", "320"),
        "SLTT, sltt_ext, all": ("10", "10.05"),
        "SLTT, sltt_ext, cache_invariant, chunk=T": ("30", "240"),
    }.items()
    for time_steps, peak in zip(("4", "32"), peaks)
]
NEURON = [
    {"dtype": dtype, "contender": contender, "surrogate": surrogate, "reset": "soft", "times_as_fast": times}
    for contender, surrogate, times, dtype in (
        ("spikingjelly SLTTLIFNode, steps", "ATan", "1", "float32"),
        ("sltt_ext, steps", "ATan", "4", "float32"),
        ("sltt_ext, multi-step", "ATan", "5", "float32"),
        ("sltt_ext, steps", "Sigmoid", "3.5", "float32"),
        ("sltt_ext, multi-step", "Sigmoid", "3", "float32"),
        ("sltt_ext compiled, steps", "Sigmoid", "6", "float32"),
        ("sltt_ext, steps", "Sigmoid", "9", "bfloat16"),
    )
]


@pytest.mark.parametrize(
    ("figure", "rows", "expected"),
    [
        (claims.lowest("SLTT", "peak_mb", time_steps="32"), OVER_TIME, 10.05),
        (claims.growth, OVER_TIME, 0.005),
        (claims.neuron(compiled=False), NEURON, 3.5),
        (claims.neuron(compiled=True), NEURON, 6),
    ],
)
def test_a_claim_reads_the_figure_that_counts(figure, rows, expected):
    assert figure(rows)[0] == pytest.approx(expected)


@pytest.mark.parametrize("name", tables.PAGES)
def test_the_tables_in_the_docs_are_the_measured_ones(name):
    page = (ROOT / name).read_text()
    assert tables.MARKED.search(page)
    assert page == tables.with_tables(page)


@pytest.mark.filterwarnings("ignore:batch norms take their statistics")
@pytest.mark.parametrize(
    ("method", "options"),
    [("step", {}), ("chunk=T", {"chunk": T}), ("whole pass first", {"norms": "sequence"})],
)
@pytest.mark.parametrize(
    ("network", "sizes"),
    [
        (networks_in_one_call.SEWResNet, (4,)),
        (networks_in_one_call.Spikformer, (8, 1)),
        (networks_in_one_call.SpikeDrivenTransformer, (8, 1)),
    ],
)
def test_prototypes_of_norms_over_time_are_what_the_library_does(network, sizes, method, options):
    torch.manual_seed(0)
    net = network(2, *sizes).double()
    x_seq, target = torch.randn(T, 2, 2, 16, 16, dtype=torch.float64), torch.tensor([0, 3])
    norms = step_norms.Norms(sltt_ext.convert(copy.deepcopy(net)))
    expected, output = step_norms.gradient(norms, (x_seq, target), method, F.cross_entropy)
    actual = sltt_ext.over_time(net, time_dim=0, **options)(x_seq)
    F.cross_entropy(actual, target).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    assert torch.allclose(actual, output, atol=1e-9)
    assert oracle.relative_error([gradient], [expected]) < 1e-6


@pytest.mark.parametrize("delay", [5, 10, 20])
def test_a_cue_is_shown_once_and_asked_for_after_the_delay(delay):
    x, cue = memory_tasks.store_and_recall(7, delay, torch.Generator().manual_seed(0))
    window = memory_tasks.covering_window(delay)
    shown = F.one_hot(cue, memory_tasks.CUES).float()
    cues, noise, asks = x.split([memory_tasks.CUES, memory_tasks.NOISE, 1], dim=2)
    assert len(x) == 2 * window
    assert torch.equal(cues[-2 - delay], shown)
    assert asks[-1].all()
    assert cues.sum() == asks.sum() == 7
    assert abs(noise.mean() - memory_tasks.NOISE_RATE) < 0.1
    assert window / 2 < delay + 2 <= window


def test_digits_are_shown_a_part_at_each_step():
    images = torch.rand(3, 1, 8, 8)
    rows, pixels = memory_tasks.by_row(images), memory_tasks.by_pixel(images)
    assert torch.equal(torch.stack(list(rows), 1), images[:, 0])
    assert torch.equal(pixels.sum(0), images.flatten(1))
    assert all(step.count_nonzero() == step[:, t].count_nonzero() for t, step in enumerate(pixels))


@pytest.mark.parametrize("window", [1, 4, 8])
@pytest.mark.parametrize("neuron", ["Leaky", "RLeaky"])
def test_a_last_window_has_the_gradient_of_a_loss_on_the_last_step(neuron, window):
    task = memory_tasks.recall_task(5, neuron, 1, 0.01)
    x_seq, cue = task.train(torch.Generator().manual_seed(0))
    net = task.network()
    by_hand = copy.deepcopy(net)
    target = memory_tasks.asked_at_the_end(cue, task.time_steps)
    memory_tasks.trainer(net, task.time_steps, window).forward_backward(x_seq, target)
    by_hand[1].reset_mem()
    for t, x in enumerate(x_seq):
        if t == task.time_steps - window:
            for name in {"mem", "spk"} & set(by_hand[1]._buffers):
                setattr(by_hand[1], name, getattr(by_hand[1], name).detach())
        output = by_hand(x)
    (F.cross_entropy(output, cue) / task.time_steps).backward()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(by_hand)) < 1e-6


def test_a_run_of_a_memory_task_learns_what_a_window_covers():
    task = replace(memory_tasks.digits_task(memory_tasks.by_row, (2, 4), 600), iterations=50)
    found = memory_tasks.run(task, 4, 0)
    assert found["test_accuracy"] > 0.2
    assert (
        found["peak_activation_kb"]
        < 0.7 * memory_tasks.run(replace(task, iterations=1), None, 0)["peak_activation_kb"]
    )


@pytest.mark.slow
def test_the_kernel_benchmark_runs(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "neuron_kernel.py"),
        "--smoke",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "neuron_kernel.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["phase"] for row in rows} == {"forward", "backward", "evaluation"}
    assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}
    assert "sltt_ext torch" in {row["contender"] for row in rows}
    assert all(float(row["microseconds"]) > 0 for row in rows)
