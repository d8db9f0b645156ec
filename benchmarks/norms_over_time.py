"""Batch norms where a multi-step network runs step by step: gradients, accuracy and memory of several remedies.

python benchmarks/norms_over_time.py gradients --data FOLDER
python benchmarks/norms_over_time.py accuracy --data FOLDER     FOLDER/{train,test}/<class>/*.jpg
python benchmarks/norms_over_time.py memory                     of `over_time` itself

Writes `norms_over_time.csv`, `norms_over_time_accuracy.csv` and `norms_over_time_memory.csv` in `results`. All gradients are
compared with SLTT's gradient of the original network, with norms over all T N samples (`chunk=T`). The methods are explained in
`step_norms`. The networks are small (`networks_in_one_call`), and images and frames have 16 x 16 pixels. Rows are appended as soon
as they are there, and what is in the files is not repeated.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy import MEAN, STD, append, recorded
from measure import RESULTS, version_of, write_results
from networks_in_one_call import NETWORKS, SEWResNet
from spikingjelly.activation_based import functional
from step_norms import METHODS, TWICE, Batch, Norms, gradient
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import datasets, transforms

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.analysis.timing import device_name
from sltt_ext.data import load_event_digits

BATCHES = {2: 4, 8: 2, 32: 1, 128: 1}
"""Samples of a batch -> how many batches are measured."""
WARM_UP = 40
COMPARED = (*METHODS, TWICE)
VERSIONS = {"device": device_name(), "torch": torch.__version__, "spikingjelly": version_of("spikingjelly")}
IMAGES = {"train": 200, "test": 50}
"""Of each class; a subset of the folder's."""


@dataclass(frozen=True)
class Data:
    """Sequences ``[N, T, ...]``, or images ``[N, ...]`` that are shown T times, and labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    time_steps: int

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Batches of the training set in random order, without end. The last samples of an order are left out."""
        order = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(len(self.train), generator=order).split(size):
                if len(chosen) == size:
                    yield self.sequence(self.train[chosen]), self.train_labels[chosen]

    def sequence(self, x: Tensor) -> Tensor:
        """``[T, N, ...]``."""
        return x.transpose(0, 1) if x.dim() == 5 else x.expand(self.time_steps, *x.shape)


def event_digits() -> Data:
    data = load_event_digits(time_steps=6)
    return Data(data.train_frames, data.train_labels, data.test_frames, data.test_labels, 6)


def images(root: Path) -> Data:
    shown = transforms.Compose(
        [transforms.Resize(16), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )

    def part(name: str) -> tuple[Tensor, Tensor]:
        folder = datasets.ImageFolder(str(root / name), shown)
        labels = torch.tensor(folder.targets)
        chosen = torch.cat([(labels == one).nonzero().flatten()[: IMAGES[name]] for one in labels.unique()])
        return torch.stack([folder[i][0] for i in chosen]), labels[chosen]

    return Data(*part("train"), *part("test"), 4)


def iterate(norms: Norms, optimizer: torch.optim.Optimizer, batch: Batch, method: str = "chunk=T") -> None:
    """One iteration. Running statistics move as they do in the library."""
    x_seq, target = batch
    optimizer.zero_grad()
    F.cross_entropy(METHODS[method](norms, x_seq), target).backward()
    norms.move(at_each_call=method == "step")
    norms.latest = norms.over_all_steps()
    optimizer.step()


def started(name: str, data: Data, trained: bool) -> nn.Module:
    """A network after some iterations of the original one (or, fresh, after as many iterations whose updates change nothing)."""
    torch.manual_seed(0)
    norms, batches = Norms(sltt_ext.convert(NETWORKS[name](data.train.shape[-3]))), data.batches(32, 0)
    optimizer = torch.optim.AdamW(norms.net.parameters(), lr=2e-3 if trained else 0.0)
    for _ in range(WARM_UP):
        iterate(norms, optimizer, next(batches))
    functional.reset_net(norms.net)
    return norms.net


def gradients(sets: dict[str, Data]) -> None:
    path = RESULTS / "norms_over_time.csv"
    done = recorded(path, ("set", "network", "trained"))
    for set_name, network, trained in itertools.product(sets, NETWORKS, (True, False)):
        if (set_name, network, str(trained)) in done:
            continue
        data = sets[set_name]
        net = started(network, data, trained)
        found = {size: compared(net, data, size, trained) for size in BATCHES}
        for size, by_method in found.items():
            for method, values in by_method.items():
                cosines, ratios, outputs = zip(*values, strict=True)
                append(
                    path,
                    {
                        "set": set_name,
                        "network": network,
                        "trained": trained,
                        "time_steps": data.time_steps,
                        "batch": size,
                        "method": method,
                        "batches": len(values),
                        "cosine": round(statistics.mean(cosines), 4),
                        "cosine_lowest": round(min(cosines), 4),
                        "cosine_highest": round(max(cosines), 4),
                        "norm_ratio": round(statistics.mean(ratios), 4),
                        "output_error": round(statistics.mean(outputs), 4),
                        **VERSIONS,
                    },
                )


def compared(
    net: nn.Module, data: Data, size: int, trained: bool
) -> dict[str, list[tuple[float, float, float]]]:
    """Cosine and norm ratio to the gradient of chunk=T, and relative error of the output, by method and batch."""
    values: dict[str, list[tuple[float, float, float]]] = {method: [] for method in COMPARED}
    batches = data.batches(size, seed=1)
    for _ in range(BATCHES[size]):
        norms = Norms(copy.deepcopy(net))
        optimizer = torch.optim.AdamW(norms.net.parameters(), lr=2e-3 if trained else 0.0)
        iterate(norms, optimizer, next(batches))
        batch = next(batches)
        expected, output = gradient(norms, batch, "chunk=T", F.cross_entropy)
        for method in COMPARED:
            actual, own = gradient(norms, batch, method, F.cross_entropy)
            cosine = F.cosine_similarity(actual, expected, dim=0).item()
            error = ((own - output).norm() / output.norm()).item()
            values[method].append((cosine, (actual.norm() / expected.norm()).item(), error))
    return values


EPOCHS, BATCH, SEEDS = 2, 16, 5
TRAINED_BY = ("chunk=T", "step", "whole pass first")


def accuracy(sets: dict[str, Data]) -> None:
    path = RESULTS / "norms_over_time_accuracy.csv"
    done = recorded(path, ("set", "method", "seed"))
    for seed in range(SEEDS):
        for set_name, data in sets.items():
            for method in TRAINED_BY:
                if (set_name, method, str(seed)) in done:
                    continue
                append(
                    path,
                    {
                        "set": set_name,
                        "network": "SEW-ResNet, 8 channels",
                        "batch": BATCH,
                        "method": method,
                        "seed": seed,
                        "test_accuracy": round(trained_accuracy(data, method, seed), 4),
                        "time_steps": data.time_steps,
                        "epochs": EPOCHS,
                        "training_samples": len(data.train),
                        "test_samples": len(data.test),
                        **VERSIONS,
                    },
                )


def trained_accuracy(data: Data, method: str, seed: int) -> float:
    """Train by a method, and return the accuracy on the test set with running statistics."""
    torch.manual_seed(seed)
    norms = Norms(sltt_ext.convert(SEWResNet(data.train.shape[-3], width=8)))
    iterations = EPOCHS * (len(data.train) // BATCH)
    optimizer = torch.optim.AdamW(norms.net.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    batches = data.batches(BATCH, seed)
    for _ in range(iterations):
        iterate(norms, optimizer, next(batches), method)
        scheduler.step()
    norms.net.eval()
    correct = [
        (norms.evaluated(data.sequence(x)).argmax(1) == labels).sum()
        for x, labels in zip(data.test.split(100), data.test_labels.split(100), strict=True)
    ]
    return int(torch.stack(correct).sum()) / len(data.test)


def memory() -> Iterator[dict[str, Any]]:
    """Peak memory of activations and gradients of an iteration of `over_time`, N = 8."""
    x, target = torch.rand(8, 3, 16, 16), torch.arange(8)
    for time_steps in (4, 16):
        for name, build in NETWORKS.items():
            peaks = {}
            for label, options in LIBRARY.items():
                chunk = time_steps if label == "chunk=T" else 1
                net = sltt_ext.over_time(build(3), time_steps, chunk=chunk, **options)
                peaks[label] = round(peak_activation_bytes(partial(_iteration, net, x, target)) / 1e6, 1)
            yield {"network": name, "time_steps": time_steps, "batch": len(x), **peaks}


LIBRARY: dict[str, dict[str, Any]] = {"step": {}, "sequence": {"norms": "sequence"}, "chunk=T": {}}


def _iteration(net: nn.Module, x: Tensor, target: Tensor) -> None:
    F.cross_entropy(net(x), target).backward()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["gradients", "accuracy", "memory"])
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    if options.what == "memory":
        write_results("norms_over_time_memory", memory())
        return
    if options.data is None:
        parser.error("images are read from --data FOLDER, with FOLDER/{train,test}/<class>/*.jpg")
    sets = {"images": images(options.data), "event digits": event_digits()}
    if options.what == "accuracy":
        accuracy(sets)
    else:
        gradients(sets)


if __name__ == "__main__":
    main()
