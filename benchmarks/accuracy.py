"""Test accuracy by BPTT, SLTT, SLTT-K, windows between them, and rate-based backpropagation.

python benchmarks/accuracy.py digits
python benchmarks/accuracy.py event_digits
python benchmarks/accuracy.py images --data FOLDER      FOLDER/{train,test}/<class>/*.jpg, 32 x 32 pixels
python benchmarks/accuracy.py cost                      time and memory of one iteration of each

For each seed all methods start with the same weights and see the same batches, so that their differences are paired. Each run
is a row, seed by seed, which is appended to benchmarks/results/accuracy_SET.csv as soon as it is there. Runs that are in the
file are not repeated, so a stopped measurement goes on where it was. Everything runs on one thread.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, version_of, write_results
from peers.rate_based import RateBasedTrainer
from rich.progress import track
from spikingjelly.activation_based import layer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import datasets, transforms
from torchvision.datasets.folder import default_loader

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.analysis.timing import device_name, interleaved_medians
from sltt_ext.methods import GradientTrainer, method_named
from sltt_ext.models import PreActResNet, paper_lif

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

Sets = tuple[Dataset[tuple[Tensor, int]], Dataset[tuple[Tensor, int]]]


@dataclass(frozen=True)
class Setting:
    """What all methods share on one data set. The rest is the paper's: SGD, momentum 0.9, cosine annealing.

    Attributes:
        methods: ``BPTT``, ``SLTT``, ``SLTT-K``, ``window C`` (BPTT within C steps) and ``rate-based``.
        by_scale: The methods that are also trained with ``scale="paper"``.
    """

    sets: Callable[[Path | None], Sets]
    network: Callable[[], nn.Module]
    time_steps: int
    time_dim: int | None
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seeds: int
    methods: tuple[str, ...]
    by_scale: tuple[str, ...] = ()

    def runs(self, seeds: int, methods: Sequence[str]) -> Iterator[tuple[int, str, str]]:
        """Seed, method and scale, seed by seed."""
        for seed in range(seeds):
            yield from ((seed, method, "mean") for method in self.methods if method in methods)
            if seed < SEEDS_BY_SCALE:
                yield from ((seed, method, "paper") for method in self.by_scale if method in methods)


def digits(_: Path | None) -> Sets:
    from sltt_ext.data import load_digits

    data = load_digits()
    return (
        TensorDataset(data.train_images, data.train_labels),
        TensorDataset(data.test_images, data.test_labels),
    )


def event_digits(_: Path | None) -> Sets:
    from sltt_ext.data import load_event_digits

    data = load_event_digits(time_steps=10)
    return (
        TensorDataset(data.train_frames, data.train_labels),
        TensorDataset(data.test_frames, data.test_labels),
    )


def images(root: Path | None) -> Sets:
    if root is None:
        raise SystemExit("images needs --data FOLDER, with FOLDER/{train,test}/<class>/*.jpg")
    load = cache(default_loader)
    plain = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augmented = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *plain]
    return (
        datasets.ImageFolder(str(root / "train"), transforms.Compose(augmented), loader=load),
        datasets.ImageFolder(str(root / "test"), transforms.Compose(plain), loader=load),
    )


def small_network(in_channels: int, channels: tuple[int, ...], pixels: int) -> nn.Module:
    """Convolutions with batch norm and the paper's neuron, and average pooling to 2 x 2 pixels along the way."""
    layers: list[nn.Module] = []
    for outputs in channels:
        layers += [layer.Conv2d(in_channels, outputs, 3, padding=1), layer.BatchNorm2d(outputs), paper_lif()]
        in_channels = outputs
        if pixels > 2:
            layers.append(layer.AvgPool2d(2))
            pixels //= 2
    return nn.Sequential(*layers, layer.Flatten(), layer.Linear(in_channels * pixels**2, 10))


BASELINE, RATE_BASED = "BPTT", "rate-based"
METHODS = (BASELINE, "SLTT", "window 2", "SLTT-2", "window 4", RATE_BASED, "SLTT-1")
BY_SCALE, SEEDS_BY_SCALE = ("SLTT-2", "SLTT-1"), 5
"""What is trained with the published scale, too, and with so many seeds."""

SETTINGS = {
    "digits": Setting(
        digits, lambda: small_network(1, (32, 32, 32), 8), 6, None, 15, 64, 0.1, 5e-4, 10, METHODS, BY_SCALE
    ),
    "event_digits": Setting(
        event_digits, lambda: small_network(2, (16, 32, 32), 16), 10, 1, 15, 64, 0.1, 5e-4, 10, METHODS, BY_SCALE,
    ),
    "images": Setting(
        images, lambda: PreActResNet([1, 1, 1, 1], width=8), 4, None, 8, 100, 0.1, 5e-4, 5,
        tuple(method for method in METHODS if method != "window 4"),  # which is BPTT, at T = 4
    ),
}  # fmt: skip

INPUTS = {"digits": (1, 8, 8), "event_digits": (10, 2, 16, 16), "images": (3, 32, 32)}


def trainer(
    net: nn.Module, method: str, time_steps: int, time_dim: int | None, scale: str = "mean", seed: int = 0
) -> GradientTrainer:
    """The trainer of a method. The steps of SLTT-K are drawn from a generator of their own."""
    loss_fn = sltt_ext.CrossEntropyMSELoss()
    if method == RATE_BASED:
        return RateBasedTrainer(net, loss_fn, time_steps, time_dim=time_dim)
    if method.startswith("window"):
        sltt_ext.convert(net, temporal="call")
        return sltt_ext.OnlineTrainer(
            net, loss_fn, time_steps, chunk=int(method.split()[1]), time_dim=time_dim
        )
    found = replace(method_named(method), scale=scale).trainer(net, loss_fn, time_steps, time_dim=time_dim)
    if isinstance(found, sltt_ext.OnlineTrainer):
        found.generator = torch.Generator().manual_seed(seed)
    return found


def run(setting: Setting, method: str, scale: str, seed: int, train_set: Dataset, test_set: Dataset) -> float:
    """Train, and return the accuracy on the test set."""
    torch.manual_seed(seed)
    net = setting.network().to(memory_format=torch.channels_last)
    online = trainer(net, method, setting.time_steps, setting.time_dim, scale, seed)
    optimizer = torch.optim.SGD(
        net.parameters(), setting.learning_rate, momentum=0.9, weight_decay=setting.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.epochs)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(train_set, setting.batch_size, shuffle=True, generator=order)
    for _ in track(range(setting.epochs), f"{method} ({scale}), seed {seed}"):
        net.train()
        for x, target in loader:
            optimizer.zero_grad()
            online.forward_backward(x, target)
            optimizer.step()
        scheduler.step()
    net.eval()
    correct = [
        (online.predict(x).argmax(1) == target).sum()
        for x, target in DataLoader(test_set, 2 * setting.batch_size)
    ]
    return int(torch.stack(correct).sum()) / len(test_set)


def cost(repeats: int) -> Iterator[dict[str, Any]]:
    """Time and memory of one training iteration of each method on each set, with random input. The methods take turns."""
    for name, shape in INPUTS.items():
        setting = SETTINGS[name]
        torch.manual_seed(0)
        x, target = torch.randn(setting.batch_size, *shape), torch.arange(setting.batch_size) % 10
        iterations = {}
        for method in setting.methods:
            net = setting.network().to(memory_format=torch.channels_last)
            online = trainer(net, method, setting.time_steps, setting.time_dim)
            iterations[method] = partial(_iteration, online, x, target)
        for iterate in iterations.values():
            iterate()  # a first iteration finds out what does not depend on time
        peaks = {method: peak_activation_bytes(iterate) for method, iterate in iterations.items()}
        seconds = interleaved_medians(iterations, repeats, time.process_time)
        for method in setting.methods:
            yield {
                "set": name,
                "method": method,
                "time_steps": setting.time_steps,
                "seconds": round(seconds[method], 4),
                "relative_seconds": round(seconds[method] / seconds[BASELINE], 2),
                "peak_mb": round(peaks[method] / 1e6, 1),
                "relative_peak": round(peaks[method] / peaks[BASELINE], 2),
            }


def _iteration(online: GradientTrainer, x: Tensor, target: Tensor) -> None:
    online.net.zero_grad()
    online.forward_backward(x, target)


def recorded(path: Path, columns: tuple[str, ...]) -> set[tuple[str, ...]]:
    """What is in a file of results, by these columns."""
    if not path.exists():
        return set()
    with path.open() as file:
        return {tuple(row[column] for column in columns) for row in csv.DictReader(file)}


def append(path: Path, row: dict[str, object]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=[*SETTINGS, "cost"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, help="so many; default: the setting's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--repeats", type=int, default=15, help="of an iteration whose cost is measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.set == "cost":
        write_results("accuracy_cost", cost(options.repeats))
        return
    setting, path = SETTINGS[options.set], RESULTS / f"accuracy_{options.set}.csv"
    sets = setting.sets(options.data)
    done = recorded(path, ("seed", "method", "scale"))
    for seed, method, scale in setting.runs(options.seeds or setting.seeds, options.methods):
        if (str(seed), method, scale) in done:
            continue
        append(
            path,
            {
                "method": method,
                "scale": scale,
                "seed": seed,
                "test_accuracy": round(run(setting, method, scale, seed, *sets), 4),
                "time_steps": setting.time_steps,
                "epochs": setting.epochs,
                "training_samples": len(sets[0]),
                "test_samples": len(sets[1]),
                "device": device_name(),
                "torch": torch.__version__,
                "spikingjelly": version_of("spikingjelly"),
            },
        )


if __name__ == "__main__":
    main()
