import copy

import oracle
import pytest
import torch
from modules import FUNCTIONAL_FORM
from spikingjelly.activation_based import functional, layer, neuron, rnn, surrogate
from torch import nn

import sltt_ext
from sltt_ext.errors import ConfigurationError, InputError

T = 5
KINDS = {"LSTM": 2, "GRU": 1, "VanillaRNN": 1}
kinds = pytest.mark.parametrize("kind", KINDS)


def loss(output):
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum()


class DetachesItsState(nn.Module):
    """A cell around the original one: SLTT by hand."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, state=None):
        return self.cell(
            x,
            state
            if state is None
            else type(state)(map(torch.Tensor.detach, state))
            if isinstance(state, tuple)
            else state.detach(),
        )


@kinds
def test_cells(kind):
    torch.manual_seed(0)
    cell = getattr(rnn, f"Spiking{kind}Cell")(4, 6)
    converted = sltt_ext.convert(copy.deepcopy(cell))
    x_seq = torch.randn(T, 3, 4)
    results = []
    for step in (DetachesItsState(cell), converted):
        state, outputs = None, []
        for x in x_seq:
            state = step(x, state)
            outputs.append(oracle.first(state))
            loss(outputs[-1]).backward(retain_graph=False)
        results.append((torch.stack(outputs), oracle.gradients(step)))
    assert torch.equal(results[1][0], results[0][0])
    assert all(torch.equal(*pair) for pair in zip(results[1][1], results[0][1], strict=True))


@pytest.mark.parametrize("bidirectional", [False, True])
@kinds
def test_recurrent_networks(kind, bidirectional):
    if kind == "GRU" and not bidirectional and not FUNCTIONAL_FORM:
        pytest.skip("0.0.0.0.14's own SpikingGRU does not run in one direction")
    torch.manual_seed(0)
    net = getattr(rnn, f"Spiking{kind}")(4, 6, num_layers=2, bidirectional=bidirectional)
    converted = sltt_ext.convert(copy.deepcopy(net))
    bptt = copy.deepcopy(net)
    for cells in [net.cells, *([net.cells_reverse] if bidirectional else [])]:
        for name, cell in list(cells.named_children()):
            setattr(cells, name, DetachesItsState(cell))
    x_seq, gradients = torch.randn(T, 3, 4), []
    for module in (net, converted, bptt):
        output, states = module(x_seq)
        assert len(states) == (2 if kind == "LSTM" else 2 * (1 + bidirectional))
        loss(output).backward()
        gradients.append([output.detach(), *oracle.gradients(module)])
    assert all(torch.equal(*pair) for pair in zip(gradients[1], gradients[0], strict=True))
    assert oracle.relative_error(gradients[2], gradients[0]) > 0.01


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = rnn.SpikingLSTM(4, 6, 1), nn.Linear(6, 2)

    def forward(self, x_seq):
        return self.head(self.lstm(x_seq)[0])


def test_whole_sequences_in_the_trainer():
    torch.manual_seed(0)
    net = sltt_ext.convert(Classifier())
    own, x_seq = copy.deepcopy(net), torch.randn(T, 3, 4)
    sltt_ext.OnlineTrainer(net, lambda output, _: loss(output), T, chunk=T, time_dim=0).forward_backward(
        x_seq, None
    )
    sum(map(loss, own(x_seq))).div(T).backward()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(own)) < 1e-6
    for options in ({"chunk": 1}, {"chunk": T, "k": 2}):
        with pytest.raises(ConfigurationError, match=r"SLTTSpikingLSTM takes its whole sequence .* chunk=5"):
            sltt_ext.OnlineTrainer(net, lambda output, _: loss(output), T, **options)


@pytest.mark.parametrize("container", ["MultiStepContainer", "StepModeContainer"])
def test_containers_of_single_step_neurons(container):
    torch.manual_seed(0)
    inner = (
        nn.Linear(7, 7),
        neuron.LIFNode(surrogate_function=surrogate.ATan(), decay_input=False, v_threshold=0.5),
    )
    if container == "MultiStepContainer":
        made = layer.MultiStepContainer(*inner)
    else:
        made = layer.StepModeContainer(True, *(["m"] if FUNCTIONAL_FORM else []), *inner)
        made.step_mode = "m"
    net = nn.Sequential(layer.Linear(7, 7, step_mode="m"), made)
    steps = copy.deepcopy(nn.Sequential(nn.Linear(7, 7), *inner))
    steps[0].load_state_dict(net[0].state_dict())
    x_seq = 2 * torch.randn(T, 4, 7)
    for x in x_seq:
        loss(steps(x)).div(T).backward()
        functional.detach_net(steps)
    expected = oracle.gradients(steps)
    assert expected[0].norm() > 0
    net = sltt_ext.convert(net)
    online = sltt_ext.OnlineTrainer(net, lambda output, _: loss(output), T, time_dim=0)
    online.forward_backward(x_seq, None)
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6
    assert type(sltt_ext.revert(net)[1]) is getattr(layer, container)


@pytest.mark.skipif(not FUNCTIONAL_FORM, reason="SpikingJelly 2.x")
@pytest.mark.parametrize("inplane", [None, 3])
def test_gated_lif(inplane, monkeypatch):
    torch.manual_seed(0)
    node = neuron.GatedLIFNode(T=T, inplane=inplane)
    converted = sltt_ext.convert(copy.deepcopy(node))
    x_seq = torch.randn(T, 2, 3, 4, 4) + 0.3
    outputs = [node(x_seq), converted(x_seq)]
    assert torch.equal(*outputs)
    assert torch.equal(converted.v, node.v)
    node.reset()
    converted.reset()
    loss(converted(x_seq)).backward()
    step = functional.gated_lif_step
    with monkeypatch.context() as patch:
        patch.setattr(
            functional, "gated_lif_step", lambda x, v, s, *rest: step(x, v.detach(), s.detach(), *rest)
        )
        loss(node(x_seq)).backward()
    assert oracle.relative_error(oracle.gradients(converted), oracle.gradients(node)) < 1e-6
    with pytest.raises(InputError, match="T=5 steps, got 2"):
        converted(x_seq[:2])
    with pytest.raises(ConfigurationError, match="whole sequence"):
        sltt_ext.OnlineTrainer(converted, lambda output, _: loss(output), T, chunk=1)


@pytest.mark.skipif(not FUNCTIONAL_FORM, reason="SpikingJelly 2.x")
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_temporal_effective_batch_norm(dimensions):
    norm = getattr(layer, f"TemporalEffectiveBatchNorm{dimensions}d")(T, 3)
    net = nn.Sequential(norm, neuron.LIFNode(step_mode="m"))
    x_seq = torch.randn(T, 2, 3, *[4] * (dimensions if dimensions > 1 else 0))
    expected = net(x_seq)
    functional.reset_net(net)
    assert torch.equal(sltt_ext.convert(net)(x_seq), expected)
    with pytest.raises(ConfigurationError, match="whole sequence"):
        sltt_ext.OnlineTrainer(net, lambda output, _: loss(output), T, chunk=1)


@pytest.mark.skipif(not FUNCTIONAL_FORM, reason="SpikingJelly 2.x")
def test_container_with_time_last():
    torch.manual_seed(0)
    inner = nn.Linear(7, 7), neuron.LIFNode(surrogate_function=surrogate.ATan(), v_threshold=0.3)
    steps = nn.Sequential(*copy.deepcopy(inner))
    x_seq = 2 * torch.randn(T, 4, 7)
    for x in x_seq:
        loss(steps(x)).backward()
        functional.detach_net(steps)
    net = sltt_ext.convert(layer.TLastMultiStepContainer(*inner))
    sum(map(loss, net(x_seq.permute(1, 2, 0)).unbind(-1))).backward()
    assert net[0].weight.grad.norm() > 0
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(steps)) < 1e-6
