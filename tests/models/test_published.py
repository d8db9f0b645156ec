"""The networks are the published ones: names, outputs and gradients, from weights in the published layout."""

import networks
import products
import published
import pytest
import torch
import torchvision
from spikingjelly.activation_based import functional, neuron
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import CheckpointError
from sltt_ext.models import MODELS, load_published_checkpoint, nf_resnet34, preact_resnet18
from sltt_ext.models.published import published_name

T, WIDTH, CLASSES = 3, 8, 5
CHANNELS = {name: 2 if name in published.VGGS else 3 for name in published.NAMES}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(params=published.NAMES)
def name(request):
    return request.param


def images(name, size=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, CHANNELS[name], size, size, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 3])


def saved(name, folder):
    weights = published.state(name, WIDTH, CLASSES, CHANNELS[name])
    path = folder / "checkpoint_max.pth"
    torch.save({"net": weights, "optimizer": {}, "epoch": 3, "max_test_acc": 0.5}, path)
    return weights, path


def in_float64(path, net=None):
    torch.set_default_dtype(torch.float64)
    try:
        return load_published_checkpoint(path, net)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("name", "step_mode"), products.spread(published.NAMES, ["s", "m"]))
def test_outputs_and_gradients_are_those_of_the_published_definition(name, step_mode, tmp_path):
    weights, path = saved(name, tmp_path)
    x, target = images(name)
    leaves = {key: value.requires_grad_(not key.endswith(BUFFERS)) for key, value in weights.items()}
    lif, outputs = published.LIF(), []
    for _ in range(T):
        outputs.append(published.step(name, leaves, x, lif))
        (F.cross_entropy(outputs[-1], target) / T).backward()
    expected = torch.stack(outputs).mean(0).detach()

    net = networks.freeze_batch_norm(in_float64(path))
    functional.set_step_mode(net, step_mode)
    chunk = T if step_mode == "m" else 1
    result = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, chunk=chunk).forward_backward(x, target)
    torch.testing.assert_close(result.output, expected, rtol=1e-9, atol=1e-9)
    assert len(outputs[0].unique()) > 2  # the network is alive
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, leaves[published_name(key)].grad, rtol=1e-6, atol=1e-9)


def test_parameter_names_are_the_published_ones(name):
    with torch.device("meta"):
        net = MODELS[name](CLASSES, in_channels=CHANNELS[name], width=WIDTH)
    ours = {published_name(key): value.shape for key, value in net.state_dict().items()}
    weights = published.state(name, WIDTH, CLASSES, CHANNELS[name])
    assert ours == {key: value.shape for key, value in weights.items()}


def parameter_count(name, **options):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MODELS[name](**options).parameters())


@pytest.mark.parametrize(("name", "blocks"), [("nf_resnet34", 16), ("nf_resnet50", 16), ("nf_resnet101", 33)])
def test_nf_resnets_have_as_many_parameters_as_resnets_and_a_gain_each_block(name, blocks):
    """A gain and a bias stand where batch norm had a weight and a bias."""
    with torch.device("meta"):
        resnet = getattr(torchvision.models, name.removeprefix("nf_"))()
    assert parameter_count(name) == sum(p.numel() for p in resnet.parameters()) + blocks


@pytest.mark.parametrize("name", published.VGGS)
def test_vggs_have_as_many_parameters_as_vggs(name):
    with torch.device("meta"):
        features = getattr(torchvision.models, name)().features
    first = 64 * 9  # one input channel of the first convolution
    expected = sum(p.numel() for p in features.parameters()) - first + 49 * 512 * 10 + 10
    assert parameter_count(name) == expected


@pytest.mark.parametrize(
    ("name", "count"), [("preact_resnet18", 11_176_906), ("preact_resnet34", 21_288_778)]
)
def test_preact_resnets_have_the_published_number_of_parameters(name, count):
    weights = published.state(name, 64, 10, 3)
    assert sum(value.numel() for key, value in weights.items() if not key.endswith(BUFFERS)) == count
    assert parameter_count(name) == count


def test_weights_are_loaded_into_a_given_network(tmp_path):
    weights, path = saved("nf_resnet34", tmp_path)
    net = nf_resnet34(CLASSES, width=WIDTH, neuron=neuron.IFNode).double()
    assert load_published_checkpoint(path, net) is net
    assert torch.equal(net.layer4[2].conv2.parametrizations.bias[0].gain, weights["layer4.2.skipinit_gain"])


def test_network_made_for_a_checkpoint_has_the_neuron_asked_for(tmp_path):
    _, path = saved("vgg11_bn", tmp_path)
    net = load_published_checkpoint(path, neuron=neuron.IFNode)
    assert sum(isinstance(module, neuron.IFNode) for module in net.modules()) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preact_resnet18(CLASSES), "it is from a nf_resnet34.*lacks.*leave net out"),
        (lambda: nf_resnet34(CLASSES + 1, width=WIDTH), r"fc.weight is \[5, 64\], not \[6, 64\]"),
    ],
)
def test_checkpoint_of_another_network(make, message, tmp_path):
    _, path = saved("nf_resnet34", tmp_path)
    net = make()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_published_checkpoint(path, net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_checkpoint_of_no_network_of_ours(tmp_path):
    torch.save({"net": torchvision.models.resnet18().state_dict()}, tmp_path / "resnet18.pth")
    with pytest.raises(CheckpointError, match="fits none of the networks nf_resnet34"):
        load_published_checkpoint(tmp_path / "resnet18.pth")


def test_state_dict_alone(tmp_path):
    torch.save(published.state("vgg11_bn", WIDTH, CLASSES, 2), tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match="not in the layout of the published code"):
        load_published_checkpoint(tmp_path / "state.pth")


def test_truncated_file(tmp_path):
    _, path = saved("vgg11_bn", tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated, or is not a checkpoint"):
        load_published_checkpoint(path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        load_published_checkpoint(tmp_path / "nothing.pth")
