"""Why SLTT and BPTT may differ on colour images: small runs, each with one setting changed.

python benchmarks/accuracy_causes.py similarity --data FOLDER     of SLTT's and BPTT's gradient: `accuracy_causes_similarity.csv`
python benchmarks/accuracy_causes.py accuracy --data FOLDER       after training by either: `accuracy_causes.csv`

The network and all other settings are those of `accuracy.py images`, with 2,500 of the training images. For each seed, both methods
have the same weights at the start and the same batches. BPTT is one window of T steps (`convert(temporal="call")`). The mean
loss of the last epoch shows smaller differences than accuracy does. Rows are appended as soon as they are there, and what is in
the files is not repeated. Everything runs on one thread.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy import SETTINGS, append, recorded
from measure import RESULTS, version_of
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

import sltt_ext
from sltt_ext.analysis.timing import device_name
from sltt_ext.models import PreActResNet, paper_lif
from sltt_ext.online.options import LossOn

SETTING = SETTINGS["images"]
OF_EACH_CLASS, SEEDS = 250, 3
WARM_UP, MEASURED, NETWORKS = 40, 3, 2
"""Iterations before gradients are compared, batches they are compared on, and networks."""
VERSIONS = {"device": device_name(), "torch": torch.__version__, "spikingjelly": version_of("spikingjelly")}

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Variant:
    """What is changed, in both methods."""

    learning_rate: float = SETTING.learning_rate
    tau: float = 1.1
    loss_on: LossOn = "step"
    norms_over_time: bool = False

    def network(self, seed: int) -> nn.Module:
        """The network, with the same weights at every call with this seed. It is multi-step where norms are over time."""
        torch.manual_seed(seed)
        net = PreActResNet([1, 1, 1, 1], width=8, neuron=self._neuron).to(memory_format=torch.channels_last)
        if self.norms_over_time:
            functional.set_step_mode(net, "m")
        return net

    def trainer(self, net: nn.Module, bptt: bool) -> sltt_ext.OnlineTrainer:
        """The trainer of SLTT, or of BPTT, which is a window of all steps."""
        sltt_ext.convert(net, temporal="call" if bptt else "step")
        chunk = SETTING.time_steps if bptt or self.norms_over_time else 1
        return sltt_ext.OnlineTrainer(
            net, sltt_ext.CrossEntropyMSELoss(), SETTING.time_steps, chunk=chunk, loss_on=self.loss_on
        )

    def _neuron(self) -> nn.Module:
        made = paper_lif()
        made.tau = self.tau
        return made


VARIANTS = {
    "as in the other runs": Variant(),
    "learning rate 0.05": Variant(learning_rate=0.05),
    "learning rate 0.2": Variant(learning_rate=0.2),
    "norms over all steps (`chunk=T`)": Variant(norms_over_time=True),
    'one loss of the mean output (`loss_on="mean"`)': Variant(loss_on="mean"),
    "tau = 1.5": Variant(tau=1.5),
    "tau = 2": Variant(tau=2.0),
}
METHODS = {"BPTT": True, "SLTT": False}


def optimizer_of(net: nn.Module, learning_rate: float) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), learning_rate, momentum=0.9, weight_decay=SETTING.weight_decay)


def batches(data: Dataset, seed: int) -> DataLoader:
    """Batches whose order, crops and flips depend on the seed alone."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    return DataLoader(data, SETTING.batch_size, shuffle=True, generator=order)


def gradient(net: nn.Module, variant: Variant, bptt: bool, batch: Batch) -> Tensor:
    """The gradient of all parameters in one vector, computed on a copy of the network."""
    own = copy.deepcopy(net)
    variant.trainer(own, bptt).forward_backward(*batch)
    return torch.cat(
        [parameter.grad.flatten() for parameter in own.parameters() if parameter.grad is not None]
    )


def similarity(train_set: Dataset) -> Iterator[dict[str, Any]]:
    """A row for each variant that changes the gradient: before training, and after some iterations of SLTT."""
    for label, variant in VARIANTS.items():
        if variant.learning_rate != SETTING.learning_rate:
            continue
        found: dict[int, list[tuple[float, float]]] = {0: [], WARM_UP: []}
        for seed in range(NETWORKS):
            net = variant.network(seed)
            online, optimizer = variant.trainer(net, bptt=False), optimizer_of(net, variant.learning_rate)
            for iteration, batch in enumerate(batches(train_set, seed)):
                start = 0 if iteration < MEASURED else WARM_UP
                if start <= iteration < start + MEASURED:
                    own, other = (gradient(net, variant, bptt, batch) for bptt in (False, True))
                    cosine = F.cosine_similarity(own, other, dim=0).item()
                    found[start].append((cosine, (own.norm() / other.norm()).item()))
                if iteration == WARM_UP + MEASURED:
                    break
                if iteration < MEASURED - 1:  # the first are compared at the weights of the start
                    continue
                optimizer.zero_grad()
                online.forward_backward(*batch)
                optimizer.step()
        for iterations, values in found.items():
            cosines, ratios = zip(*values, strict=True)
            yield {
                "variant": label,
                "iterations": iterations,
                "batches": len(values),
                "cosine": round(statistics.mean(cosines), 4),
                "cosine_lowest": round(min(cosines), 4),
                "norm_ratio": round(statistics.mean(ratios), 4),
                **VERSIONS,
            }


@torch.no_grad()
def tested(online: sltt_ext.OnlineTrainer, test_set: Dataset) -> dict[str, float]:
    """Accuracy and cross-entropy of the mean output."""
    online.net.eval()
    outputs, targets = zip(
        *((online.predict(x), target) for x, target in DataLoader(test_set, 200)), strict=True
    )
    output, target = torch.cat(outputs), torch.cat(targets)
    return {
        "test_accuracy": round((output.argmax(1) == target).float().mean().item(), 4),
        "test_loss": round(F.cross_entropy(output, target).item(), 4),
    }


def run(variant: Variant, bptt: bool, seed: int, train_set: Dataset, test_set: Dataset) -> dict[str, float]:
    """Train, and return the mean loss of the last epoch and the test figures."""
    net = variant.network(seed)
    online, optimizer = variant.trainer(net, bptt), optimizer_of(net, variant.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SETTING.epochs)
    loader = batches(train_set, seed)
    for _ in range(SETTING.epochs):
        losses = []
        for x, target in loader:
            optimizer.zero_grad()
            losses.append(online.forward_backward(x, target).loss.item())
            optimizer.step()
        scheduler.step()
    return {"training_loss": round(statistics.mean(losses), 4), **tested(online, test_set)}


def accuracies(train_set: Dataset, test_set: Dataset, seeds: Sequence[int]) -> None:
    path = RESULTS / "accuracy_causes.csv"
    done = recorded(path, ("variant", "method", "seed"))
    for seed in seeds:
        for label, variant in VARIANTS.items():
            for method, bptt in METHODS.items():
                if (label, method, str(seed)) in done:
                    continue
                figures = run(variant, bptt, seed, train_set, test_set)
                append(path, {"variant": label, "method": method, "seed": seed, **figures, **VERSIONS})


def first_of_each_class(data: Any, number: int) -> Subset:
    """A given number of images of each class of an ImageFolder."""
    seen: Counter[int] = Counter()
    chosen = []
    for index, label in enumerate(data.targets):
        seen[label] += 1
        if seen[label] <= number:
            chosen.append(index)
    return Subset(data, chosen)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["similarity", "accuracy"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(SEEDS), help="of the training runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_set, test_set = SETTING.sets(options.data)
    if options.what == "accuracy":
        accuracies(first_of_each_class(train_set, OF_EACH_CLASS), test_set, options.seeds)
    else:
        path = RESULTS / "accuracy_causes_similarity.csv"
        for row in similarity(train_set):
            append(path, row)


if __name__ == "__main__":
    main()
