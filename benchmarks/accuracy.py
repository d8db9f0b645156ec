"""Test accuracy of BPTT, SLTT and SLTT-K, with the same seeds and settings: on digits, simulated event digits, images.

python benchmarks/accuracy.py digits
python benchmarks/accuracy.py event_digits
python benchmarks/accuracy.py images --data FOLDER      FOLDER/{train,test}/<class>/*.jpg, 32 x 32 pixels
python benchmarks/accuracy.py cost                      time and memory of one iteration of each

One row a run, appended to benchmarks/results/accuracy_SET.csv as soon as it is there; runs that are in the
file are not repeated, so a stopped measurement goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measure import RESULTS, version_of, write_results
from rich.progress import track
from spikingjelly.activation_based import layer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import datasets, transforms

import sltt_ext
from sltt_ext.analysis.timing import benchmark, device_name
from sltt_ext.methods import method_named
from sltt_ext.models import PreActResNet, paper_lif

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

Sets = tuple[Dataset[tuple[Tensor, int]], Dataset[tuple[Tensor, int]]]


@dataclass(frozen=True)
class Setting:
    """What all methods share on one data set; the rest is the paper's: SGD, momentum 0.9, cosine annealing."""

    sets: Callable[[Path | None], Sets]
    network: Callable[[], nn.Module]
    time_steps: int
    time_dim: int | None
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seeds: int
    methods: tuple[tuple[str, str], ...]


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
    plain = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augmented = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *plain]
    return (
        datasets.ImageFolder(str(root / "train"), transforms.Compose(augmented)),
        datasets.ImageFolder(str(root / "test"), transforms.Compose(plain)),
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


COMPARED = (("BPTT", "mean"), ("SLTT", "mean"), ("SLTT-2", "mean"))
SCALES = (("SLTT-1", "mean"), ("SLTT-2", "paper"), ("SLTT-1", "paper"))

SETTINGS = {
    "digits": Setting(
        digits, lambda: small_network(1, (32, 32, 32), 8), 6, None, 15, 64, 0.1, 5e-4, 5, (*COMPARED, *SCALES)
    ),
    "event_digits": Setting(
        event_digits,
        lambda: small_network(2, (16, 32, 32), 16),
        10,
        1,
        15,
        64,
        0.1,
        5e-4,
        5,
        (*COMPARED, *SCALES),
    ),
    "images": Setting(
        images, lambda: PreActResNet([1, 1, 1, 1], width=8), 4, None, 8, 100, 0.1, 5e-4, 3, COMPARED
    ),
}

INPUTS = {"digits": (1, 8, 8), "event_digits": (10, 2, 16, 16), "images": (3, 32, 32)}
COST_REPEATS = 15


def run(setting: Setting, method: str, scale: str, seed: int, train_set: Dataset, test_set: Dataset) -> float:
    """Train, then the accuracy on the test set."""
    torch.manual_seed(seed)
    net = setting.network().to(memory_format=torch.channels_last)
    chosen = replace(method_named(method), scale=scale)
    loss_fn = sltt_ext.CrossEntropyMSELoss()
    online = chosen.trainer(net, loss_fn, setting.time_steps, time_dim=setting.time_dim)
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


def cost() -> None:
    """Time and memory of one training iteration of each setting, random input."""
    rows = []
    for name, shape in INPUTS.items():
        setting = SETTINGS[name]
        torch.manual_seed(0)
        x, target = torch.randn(setting.batch_size, *shape), torch.arange(setting.batch_size) % 10
        net = setting.network().to(memory_format=torch.channels_last)
        measured = benchmark(
            net, x, target, sltt_ext.CrossEntropyMSELoss(), setting.time_steps,
            methods=("bptt", "sltt", "sltt-2"), repeats=COST_REPEATS, time_dim=setting.time_dim,
        )  # fmt: skip
        rows += [
            {
                "set": name,
                "method": row.method,
                "time_steps": setting.time_steps,
                "seconds": round(row.seconds, 4),
                "relative_seconds": round(row.relative_seconds, 2),
                "peak_mb": round(row.peak_bytes / 1e6, 1),
                "relative_peak": round(row.relative_bytes, 2),
            }
            for row in measured.rows
        ]
    write_results("accuracy_cost", rows)


def missing(path: Path, setting: Setting) -> Iterator[tuple[int, str, str]]:
    """Runs that are not in the file yet, method by method."""
    done = set()
    if path.exists():
        with path.open() as file:
            done = {(int(row["seed"]), row["method"], row["scale"]) for row in csv.DictReader(file)}
    for method, scale in setting.methods:
        for seed in range(setting.seeds):
            if (seed, method, scale) not in done:
                yield seed, method, scale


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
    options = parser.parse_args()
    if options.set == "cost":
        cost()
        return
    setting, path = SETTINGS[options.set], RESULTS / f"accuracy_{options.set}.csv"
    train_set, test_set = setting.sets(options.data)
    for seed, method, scale in missing(path, setting):
        accuracy = run(setting, method, scale, seed, train_set, test_set)
        append(
            path,
            {
                "method": method,
                "scale": scale,
                "seed": seed,
                "test_accuracy": round(accuracy, 4),
                "time_steps": setting.time_steps,
                "epochs": setting.epochs,
                "training_samples": len(train_set),
                "test_samples": len(test_set),
                "device": device_name(),
                "torch": torch.__version__,
                "spikingjelly": version_of("spikingjelly"),
            },
        )


if __name__ == "__main__":
    main()
