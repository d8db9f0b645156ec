import copy
from types import SimpleNamespace

import networks
import oracle
import pytest
import torch
from graphed import (
    BATCH,
    T,
    assert_as_eager,
    assert_same,
    batch,
    iterations,
    net_of,
    online_of,
    seen,
    twins,
)
from spikingjelly.activation_based import layer
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import LossError, SLTTWarning
from sltt_ext.online import cuda_graphs


def test_the_gradient_reaches_every_layer():
    online = online_of(net_of(), graph=False)
    online.forward_backward(*batch(0))
    assert all(parameter.grad.abs().max() > 1e-4 for parameter in online.net[1:].parameters())


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize(
    "options",
    [{}, {"chunk": T}, {"pack_spikes": True}, {"cache_invariant": False}],
)
def test_iterations_are_those_without_graphs(step_mode, options):
    if step_mode == "s" and "chunk" in options:
        pytest.skip("single steps have no chunk")
    assert_as_eager(10, step_mode=step_mode, **options)


@pytest.mark.parametrize("full_output", [True, False])
@pytest.mark.parametrize("k", [1, 2])
def test_every_draw_has_a_graph_and_draws_go_on_outside(k, full_output):
    graphed, eager = twins(k=k, full_output=full_output)
    for online in (graphed, eager):
        online.generator = torch.Generator().manual_seed(3)
    assert_same(iterations(graphed, 16), iterations(eager, 16))
    assert graphed._graphs.captured == 3
    assert graphed._graphs.backend.replays >= 6


def test_a_schedule_with_counts_has_a_graph_for_each():
    assert_as_eager(12, schedule=lambda time_steps, generator: {0: 1.0, 2: 2.0})


def keep(online, i):
    """Gradients of all iterations add up."""


def fill_with_zeros(online, i):
    online.net.zero_grad(set_to_none=False)


def every_other(online, i):
    if i % 2:
        online.net.zero_grad()


@pytest.mark.parametrize("before", [keep, fill_with_zeros, every_other])
def test_gradients_accumulate_as_backward_accumulates_them(before):
    assert_as_eager(before=before)


def test_what_a_user_keeps_of_an_iteration_stays():
    graphed, _ = twins()
    iterations(graphed, 6)
    kept = [parameter.grad.detach() for parameter in graphed.net.parameters()]
    result = graphed.forward_backward(*batch(1))
    before = [tensor.clone() for tensor in (*kept, result.loss, result.output)]
    graphed.net.zero_grad()
    graphed.forward_backward(*batch(2))
    assert all(map(torch.equal, (*kept, result.loss, result.output), before))


def test_an_optimizer_trains_as_without():
    found = []
    for online in twins():
        optimizer = torch.optim.Adam(online.net.parameters(), 0.01)
        torch.manual_seed(5)
        for i in range(10):
            optimizer.zero_grad()
            online.forward_backward(*batch(i))
            optimizer.step()
        found.append([parameter.detach().clone() for parameter in online.net.parameters()])
    assert oracle.relative_error(*found) < 1e-5


def test_a_parameter_without_a_gradient_gets_none():
    def before(online, i):
        online.net.zero_grad()
        online.net[0].weight.requires_grad_(False)

    assert_as_eager(before=before)


def shapes(i):
    return batch(i, 2 if i % 5 == 4 else BATCH)


def test_a_smaller_last_batch_has_its_own_graph():
    graphed = assert_as_eager(20, data=shapes, replays=12)
    assert graphed._graphs.captured == 2


def evaluates(online, i):
    online.net.zero_grad()
    online.net.train(i % 2 == 0)


def thaws(online, i):
    online.net.zero_grad()
    online.net[0].weight.requires_grad_(i >= 6)


def moves_weights(online, i):
    online.net.zero_grad()
    if i == 6:
        online.net[0].weight.data = online.net[0].weight.data + 1


def changes_dropout(online, i):
    online.net.zero_grad()
    online.net[6].p = 0.3 if i < 6 else 0.9


def changes_tau(online, i):
    online.net.zero_grad()
    if i == 6:
        online.net[5].tau = 5.0


def replaces_a_layer(online, i):
    online.net.zero_grad()
    if i == 6:
        online.net[7] = nn.Sequential(layer.Flatten(step_mode=online.net[7].step_mode), nn.Tanh())


def loads(online, i):
    online.net.zero_grad()
    if i == 6:
        state = {name: 2 * value for name, value in online.net.state_dict().items()}
        online.net.load_state_dict(state)


@pytest.mark.parametrize(
    "before", [evaluates, thaws, moves_weights, changes_dropout, changes_tau, replaces_a_layer, loads]
)
def test_what_changes_between_iterations_is_seen(before):
    assert_as_eager(12, before=before)


def test_autocast_has_a_graph_of_its_own_and_leaves_nothing_in_its_cache():
    found = []
    for online in twins(schedule=lambda *_: (1,)):
        torch.manual_seed(5)
        own = []
        for i in range(14):
            online.net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=i % 4 > 0):
                with torch.no_grad():
                    online.net[8](torch.ones(1, BATCH, 256))
                own.append(seen(online, online.forward_backward(*batch(i))))
                own[-1][0].append(online.net[8](torch.ones(1, BATCH, 256)).detach())
            with torch.no_grad():
                online.net[8].weight.mul_(0.9)
        found.append(own)
    assert_same(*found)


def test_the_states_are_at_rest_afterwards():
    graphed, _ = twins()
    for i in range(6):
        graphed.forward_backward(*batch(i))
        assert isinstance(graphed.net[2].v, float)


def test_predictions_in_between_change_nothing():
    def before(online, i):
        online.net.zero_grad()
        online.predict(batch(i)[0])

    assert_as_eager(before=before)


def test_two_trainers_share_a_network():
    found = []
    for graph in (True, False):
        net = net_of()
        both = [online_of(net, graph), online_of(net, graph, chunk=T)]
        torch.manual_seed(5)
        own = []
        for i in range(8):
            for online in both:
                net.zero_grad()
                own.append(seen(online, online.forward_backward(*batch(i))))
        found.append(own)
        assert not graph or all(online._graphs.backend.replays > 3 for online in both)
    assert_same(*found)


def test_inputs_over_time_and_in_parts():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net_of()

        def forward(self, x):
            return self.net(x["a"] + x["b"])

    found = []
    for graph in (True, False):
        online = online_of(Both(), graph, time_dim=1, target_time_dim=1)
        torch.manual_seed(5)
        own = []
        for i in range(8):
            online.net.zero_grad()
            x, target = batch(i)
            x_seq = torch.stack([x, 2 * x, 3 * x], 1)
            own.append(
                seen(online, online.forward_backward({"a": x_seq, "b": x_seq}, target[:, None].expand(-1, T)))
            )
        found.append(own)
    assert_same(*found)


def test_a_plan_that_is_still_measured_is_waited_for(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "WARM_UP", 1)
    online = online_of(net_of(dropout=0), chunk="auto")
    measured = []
    for i in range(40):
        online.forward_backward(*batch(i))
        measured.append((online._is_measuring, online._graphs.captured))
    assert measured[0] == (True, 0)
    assert all(captured == 0 for measuring, captured in measured if measuring)
    assert measured[-1] == (False, 1)
    assert online.plan.is_decided


def test_more_kinds_than_are_kept_run_without_a_graph_and_that_is_said_once(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "AT_MOST", 1)
    monkeypatch.setattr(cuda_graphs, "_IN_A_ROW", 2)
    graphed, eager = twins(k=1)
    for online in (graphed, eager):
        online.generator = torch.Generator().manual_seed(3)
    with pytest.warns(SLTTWarning, match="iterations in a row had no graph") as said:
        actual = iterations(graphed, 10)
    assert len([one for one in said if "in a row" in str(one.message)]) == 1
    assert_same(actual, iterations(eager, 10))
    assert graphed._graphs.captured == 1


def test_who_looks_at_operators_sees_them():
    from torch.utils.flop_counter import FlopCounterMode

    graphed, _ = twins()
    iterations(graphed, 6)
    with FlopCounterMode(display=False) as counter:
        graphed.forward_backward(*batch(0))
    assert counter.get_total_flops() > 0


def test_errors_of_an_iteration_are_those_without_graphs():
    online = online_of(net_of(), loss_fn=lambda output, target: output.sum(1))
    with pytest.raises(LossError, match="scalar"):
        online.forward_backward(*batch(0))
    with torch.no_grad(), pytest.raises(LossError, match="gradients are disabled"):
        online.forward_backward(*batch(0))


def test_generators_of_modules_are_registered():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.source = torch.Generator().manual_seed(1)

        def forward(self, x):
            return x + torch.rand(x.shape, generator=self.source)

    net = net_of(middle=Noise)
    found = []
    for graph in (True, False):
        online = online_of(copy.deepcopy(net), graph)
        online.net[3].source = torch.Generator().manual_seed(1)
        found.append(iterations(online, 8))
        if graph:
            assert online._graphs.backend.generators == [[online.net[3].source]]
    assert_same(*found)


def test_networks_of_snntorch(monkeypatch):
    import snntorch
    from snntorch import surrogate

    def make():
        torch.manual_seed(0)
        grad = surrogate.atan()
        return sltt_ext.convert(
            nn.Sequential(
                nn.Flatten(),
                nn.Linear(64, 20),
                snntorch.Leaky(0.8, init_hidden=True, learn_beta=True, spike_grad=grad),
                nn.Linear(20, 5),
                snntorch.Leaky(0.8, init_hidden=True, spike_grad=grad),
            )
        )

    found = []
    for graph in (True, False):
        online = online_of(make(), graph)
        found.append([tensors[:2] for tensors, _ in iterations(online, 12)])
    for ours, expected in zip(*found):
        assert torch.allclose(ours[0], expected[0])
        assert torch.allclose(ours[1], expected[1])


def test_the_stream_that_captures_waits_and_is_waited_for(monkeypatch):
    """The backend on a device, with a device that writes down what it is told."""
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    class Graph:
        def register_generator_state(self, generator):
            told.append("registers")

        def pool(self):
            return "pool"

        def replay(self):
            told.append("replays")

    class Capture:
        def __init__(self, graph, pool, stream, capture_error_mode):
            told.append(f"captures on {stream.name}, {pool}, {capture_error_mode}")

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    from contextlib import nullcontext

    cuda = SimpleNamespace(
        Stream=lambda device: Stream("side"), current_stream=lambda device: Stream("current"),
        stream=lambda stream: nullcontext(), device=lambda device: nullcontext(), CUDAGraph=Graph, graph=Capture,
    )  # fmt: skip
    monkeypatch.setattr(cuda_graphs.torch, "cuda", cuda)
    backend = cuda_graphs.CudaGraphs()
    device = torch.device("cpu")
    with backend.aside(device):
        told.append("runs")
    for _ in range(2):
        outputs, replay = backend.capture(lambda: ["outputs"], ["generator"], device)
    replay()
    assert outputs == ["outputs"]
    assert told == [
        "side waits for current", "runs", "current waits for side",
        "registers", "captures on side, None, thread_local",
        "registers", "captures on side, pool, thread_local",
        "replays",
    ]  # fmt: skip


def test_the_networks_of_the_other_tests_are_captured():
    net = networks.conv_net()
    x, target = networks.images()
    expected = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy)
    online = online_of(sltt_ext.convert(net))
    for _ in range(5):
        net.zero_grad()
        online.forward_backward(x, target)
    assert online._graphs.backend.replays == 2
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-5
