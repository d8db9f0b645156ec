"""Train a SpikingJelly network on scikit-learn's handwritten digits with SLTT or SLTT-K.

python examples/digits/train.py            SLTT
python examples/digits/train.py --k 2      SLTT-K with K = 2
"""

import argparse

import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sltt_ext
from sltt_ext.data import load_digits

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--k", type=int, default=None, help="back-propagate K of the T steps; default all")
parser.add_argument("--time-steps", type=int, default=6, metavar="T")
parser.add_argument("--epochs", type=int, default=5)
options = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
loader = DataLoader(TensorDataset(digits.train_images, digits.train_labels), batch_size=64, shuffle=True)

net = nn.Sequential(
    layer.Conv2d(1, 32, 3, padding=1, bias=False),
    layer.BatchNorm2d(32),
    neuron.LIFNode(surrogate_function=surrogate.ATan()),
    layer.MaxPool2d(2),
    layer.Conv2d(32, 64, 3, padding=1, bias=False),
    layer.BatchNorm2d(64),
    neuron.LIFNode(surrogate_function=surrogate.ATan()),
    layer.Flatten(),
    layer.Linear(64 * 16, 10),
)
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, options.time_steps, k=options.k)

for epoch in range(1, options.epochs + 1):
    net.train()
    total = torch.zeros(())
    for images, labels in loader:
        optimizer.zero_grad()
        total += online.forward_backward(images, labels).loss
        optimizer.step()
    net.eval()
    accuracy = (online.predict(digits.test_images).argmax(1) == digits.test_labels).float().mean()
    print(f"epoch {epoch}: loss {total / len(loader):.3f}, test accuracy {accuracy:.1%}")
