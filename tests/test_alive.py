"""The networks of the examples fire and learn; those of the documentation are trained on where its pages run."""

import runpy
import sys
from pathlib import Path

import alive
import pytest
import snntorch
import torch
from torch.nn import functional as F

import sltt_ext

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = {
    "any_script": ["--epochs", "1", "--sltt"],
    "digits": ["--epochs", "1", "--time-steps", "3"],
    "snntorch": ["--epochs", "1", "--time-steps", "3"],
    "snntorch conv": ["--epochs", "1", "--time-steps", "3", "--network", "conv"],
    "wrap_existing": ["sew_resnet18", "--images", "32", "--epochs", "1", "--time-steps", "2"],
    "wrap_existing torchvision": ["resnet18", "--images", "32", "--epochs", "1", "--time-steps", "2"],
}
PUBLISHED = {"preact_resnet18": (3, 32, 32), "vgg11_bn": (2, 48, 48)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_networks_of_the_scripts(name, monkeypatch, tmp_path):
    pytest.importorskip("lightning")
    folder = name.partition(" ")[0]
    monkeypatch.setattr(sys, "argv", [folder, *SCRIPTS[name]])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        snntorch.SpikingNeuron, "instances", []
    )  # of this script alone, all of which it resets
    seen = alive.Seen(monkeypatch)
    runpy.run_path(str(EXAMPLES / folder / "train.py"), run_name="__main__")
    monkeypatch.undo()
    assert seen.networks
    for net, iteration in seen.networks.items():
        net.train()
        alive.check(net, iteration)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_of_the_papers_configurations(name):
    pytest.importorskip("spikingjelly")
    from sltt_ext.models import MODELS

    torch.manual_seed(0)
    net = MODELS[name](num_classes=10)
    x, target = torch.randn(4, *PUBLISHED[name]), torch.tensor([0, 3, 1, 2])
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, 2)
    alive.check(net, lambda: online.forward_backward(x, target).loss)
