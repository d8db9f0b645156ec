"""Train an existing network with SLTT: SEW-ResNet-18 of SpikingJelly's zoo, or torchvision's ResNet-18 made spiking.

python examples/wrap_existing/train.py sew_resnet18
python examples/wrap_existing/train.py resnet18
"""

import argparse

import torch
import torchvision
from rich.progress import track
from spikingjelly.activation_based import neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet
from torch import fx, nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.data import load_digits


def spiking_neuron() -> nn.Module:
    """Any neuron of SpikingJelly."""
    return neuron.LIFNode(decay_input=False, v_reset=None, surrogate_function=surrogate.ATan())


def sew_resnet18() -> nn.Module:
    """A network from SpikingJelly's zoo (Fang et al. 2021)."""
    return sew_resnet.sew_resnet18(
        cnf="ADD", spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), num_classes=10
    )


def resnet18() -> nn.Module:
    """Torchvision's ResNet-18 with a neuron in the place of each ReLU.

    Its blocks call one ReLU module twice. A neuron has a state, so each call gets a neuron of its own.
    """
    traced = fx.symbolic_trace(torchvision.models.resnet18(num_classes=10))
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.ReLU):
            traced.add_submodule(node.name, spiking_neuron())
            node.target = node.name
    traced.recompile()
    return traced


NETWORKS = {"sew_resnet18": sew_resnet18, "resnet18": resnet18}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("network", choices=NETWORKS)
parser.add_argument("--time-steps", type=int, default=4, metavar="T")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--images", type=int, default=1297, help="how many of the digits to train on")
options = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
train_x, test_x = (
    F.interpolate(images, 32).expand(-1, 3, -1, -1) for images in (digits.train_images, digits.test_images)
)
train_x, train_y = train_x[: options.images], digits.train_labels[: options.images]

net = NETWORKS[options.network]()
# two lines bring the network to SLTT; the third is forward_backward, in the loop
net = sltt_ext.convert(net)
online = sltt_ext.OnlineTrainer(net, F.cross_entropy, options.time_steps)

optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for epoch in range(options.epochs):
    net.train()
    batches = torch.randperm(len(train_y)).split(32)
    for batch in track(batches, f"epoch {epoch + 1}"):
        optimizer.zero_grad()
        online.forward_backward(train_x[batch], train_y[batch])
        optimizer.step()
    net.eval()
    correct = online.predict(test_x).argmax(1) == digits.test_labels
    print(f"epoch {epoch + 1}: test accuracy {correct.float().mean():.1%}")
