"""Train a SpikingJelly network on scikit-learn's handwritten digits with SLTT or SLTT-K, in Lightning.

python examples/digits/train.py            SLTT
python examples/digits/train.py --k 2      SLTT-K with K = 2
"""

import argparse

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sltt_ext
from sltt_ext.data import load_digits
from sltt_ext.lightning import NetworkMonitor, OnlineModule

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--k", type=int, default=None, help="back-propagate K of the T steps; default all")
parser.add_argument("--time-steps", type=int, default=6, metavar="T")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--logs", default="logs", help="folder for metrics and checkpoints")
options = parser.parse_args()


class Digits(OnlineModule):
    """The module that Lightning trains. Only the optimizer has to be added."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer and scheduler."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


torch.manual_seed(0)
digits = load_digits()
train = DataLoader(TensorDataset(digits.train_images, digits.train_labels), batch_size=64, shuffle=True)
test = DataLoader(TensorDataset(digits.test_images, digits.test_labels), batch_size=500)

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
online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, options.time_steps, k=options.k)
trainer = pl.Trainer(
    max_epochs=options.epochs,
    log_every_n_steps=5,
    logger=CSVLogger(options.logs),
    callbacks=[NetworkMonitor(every_n_batches=5)],
)
trainer.fit(Digits(online), train)
trainer.test(trainer.model, test)
