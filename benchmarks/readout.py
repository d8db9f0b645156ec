"""What the accuracy is read from: the readout of snnTorch's tutorial 5, trained by BPTT and by SLTT.

The tutorial takes the cross-entropy of the last layer's membrane potentials at every step, and counts that layer's spikes for
the accuracy. Here each trained network is read in both ways. Neurons, optimizer and number of steps are the tutorial's. There
are 100 hidden neurons, and the images are scikit-learn's digits. For each seed all methods have the same weights at the start
and the same batches. Each run is a row, which is appended to `results/readout.csv`. Runs that are in the file are not
repeated. Everything runs on one thread.
"""

from __future__ import annotations

import warnings

import snntorch
import torch
from accuracy import append, recorded
from measure import RESULTS, version_of
from snntorch import utils
from torch import Tensor, nn
from torch.nn import functional as F

from sltt_ext.analysis.timing import device_name
from sltt_ext.data import Digits, load_digits
from sltt_ext.methods import method_named

TIME_STEPS, HIDDEN, BETA, BATCH, EPOCHS, SEEDS = 25, 100, 0.95, 128, 30, 5
LEARNING_RATE = 5e-4
METHODS = ("BPTT", "SLTT")


def network() -> nn.Module:
    """Tutorial 5, for images of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, HIDDEN),
        snntorch.Leaky(beta=BETA, init_hidden=True),
        nn.Linear(HIDDEN, 10),
        snntorch.Leaky(beta=BETA, init_hidden=True, output=True),
    )


@torch.no_grad()
def accuracies(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The accuracy of the class with the most spikes, and that of the class with the highest mean potential."""
    utils.reset(net)
    spikes, potentials = (torch.stack(each).sum(0) for each in zip(*(net(images) for _ in range(TIME_STEPS))))
    return {
        f"accuracy_by_{name}": round((scores.argmax(1) == labels).float().mean().item(), 4)
        for name, scores in (("spikes", spikes), ("membranes", potentials))
    }


def run(data: Digits, method: str, seed: int, epochs: int = EPOCHS) -> dict[str, float]:
    """Train, and return the accuracies on the test set."""
    torch.manual_seed(seed)
    net = network()
    online = method_named(method).trainer(net, F.cross_entropy, TIME_STEPS, output="membrane")
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999))
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.train_labels), generator=order).split(BATCH):
            optimizer.zero_grad()
            online.forward_backward(data.train_images[chosen], data.train_labels[chosen])
            optimizer.step()
    return accuracies(net, data.test_images, data.test_labels)


def main() -> None:
    torch.set_num_threads(1)
    path = RESULTS / "readout.csv"
    done = recorded(path, ("method", "seed"))
    data = load_digits()
    for seed in range(SEEDS):
        for method in METHODS:
            if (method, str(seed)) in done:
                continue
            append(
                path,
                {
                    "method": method,
                    "seed": seed,
                    **run(data, method, seed),
                    "time_steps": TIME_STEPS,
                    "beta": BETA,
                    "epochs": EPOCHS,
                    "device": device_name(),
                    "torch": torch.__version__,
                    "snntorch": version_of("snntorch"),
                },
            )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
