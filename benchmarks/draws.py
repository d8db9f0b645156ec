"""How well K of the T steps stand for all of them, by how they are drawn: `results/draws.csv`.

There are two networks: a pre-activation ResNet on handwritten digits, with the same image at every step, and a network of
snnTorch's on event digits. Both are measured before training and after some, for several seeds and batches. The gradient of each
step is computed once. The gradient of a draw is a weighted sum of these. So the error of thousands of draws, |g_K - g|^2
relative to |g|^2, follows from the products of the steps' gradients. In training the forward pass is the same whatever is
drawn, so this is exact.

With `full_output=False` an iteration ends with the last drawn step. `forward_steps` is the mean number of steps that it runs,
and `relative_seconds` is the CPU time of so many steps, relative to random draws.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import snntorch
import torch
from measure import write_results
from torch import Tensor, nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis.timing import interleaved_medians
from sltt_ext.data import load_digits, load_event_digits
from sltt_ext.models import PreActResNet
from sltt_ext.online.draws import DRAWS, Draws
from sltt_ext.online.options import TimeDim
from sltt_ext.online.schedule import selected_steps

SEEDS, BATCHES, BATCH, UPDATES, DRAWN, REPEATS = (0, 1), 3, 32, 20, 10_000, 5


@dataclass(frozen=True)
class Task:
    """A network, and what it is trained on.

    Attributes:
        name: For the table.
        network: Makes the network.
        data: ``T -> `` inputs and labels.
        time_dim: The axis of time in the inputs.
    """

    name: str
    network: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    time_dim: TimeDim | None

    def trainer(self, net: nn.Module, time_steps: int, **options: Any) -> sltt_ext.OnlineTrainer:
        """A trainer of such a network."""
        return sltt_ext.OnlineTrainer(net, F.cross_entropy, time_steps, time_dim=self.time_dim, **options)


def resnet() -> nn.Module:
    return sltt_ext.convert(PreActResNet([1, 1, 1, 1], in_channels=1, width=8))


def leaky_net() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        leaky = snntorch.Leaky(beta=0.9, init_hidden=True)
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), leaky, nn.AvgPool2d(2)]

    net = nn.Sequential(*block(2, 16), *block(16, 32), *block(32, 32), nn.Flatten(), nn.Linear(128, 10))
    return sltt_ext.convert(net)


def digits(time_steps: int) -> tuple[Tensor, Tensor]:
    data = load_digits()
    return F.interpolate(data.train_images, scale_factor=4), data.train_labels


def event_digits(time_steps: int) -> tuple[Tensor, Tensor]:
    data = load_event_digits(time_steps)
    return data.train_frames, data.train_labels


TASKS = (
    Task("ResNet, digits", resnet, digits, None),
    Task("snnTorch, event digits", leaky_net, event_digits, 1),
)


def train(task: Task, net: nn.Module, time_steps: int, seed: int) -> None:
    """Some updates of SLTT."""
    x, target = task.data(time_steps)
    online = task.trainer(net, time_steps)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    for batch in order.split(BATCH)[:UPDATES]:
        optimizer.zero_grad()
        online.forward_backward(x[batch], target[batch])
        optimizer.step()


def products_of_gradients(task: Task, net: nn.Module, time_steps: int, seed: int) -> list[Tensor]:
    """The products ``[T, T]`` of the gradients of all pairs of steps, for each batch."""
    x, target = task.data(time_steps)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed + 100))
    products, gradients = [], []

    def collect(t: int) -> None:
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        net.zero_grad()

    online = task.trainer(net, time_steps, on_step=collect)
    net.zero_grad()
    for batch in order.split(BATCH)[:BATCHES]:
        online.forward_backward(x[batch], target[batch])
        stacked = torch.stack(gradients).double()
        products.append(stacked @ stacked.T)
        gradients.clear()
    return products


@cache
def weights_of_draws(name: Draws, k: int, time_steps: int) -> Tensor:
    """The weight of each step in the mean of a draw, ``[draws, T]``; 0 where it is not drawn."""
    generator, schedule = torch.Generator().manual_seed(0), DRAWS[name](k)
    weights = torch.zeros(DRAWN, time_steps, dtype=torch.double)
    for row in weights:
        for t, count in selected_steps(schedule, time_steps, generator).items():
            row[t] = count / k
    return weights


def variance(weights: Tensor, products: Tensor) -> float:
    """The mean of ``|g_K - g|^2`` over draws, relative to ``|g|^2``."""
    away = weights - 1 / weights.shape[1]
    return float((away @ products * away).sum(1).mean() / products.mean())


def cosines(products: list[Tensor]) -> tuple[float, float]:
    """The mean cosine similarity of the gradients of neighbouring steps, and of other pairs of steps."""
    near, far = [], []
    for each in products:
        norms = each.diagonal().sqrt()
        cosine = each / norms / norms.unsqueeze(1)
        near.append(float(cosine.diagonal(1).mean()))
        apart = torch.ones_like(cosine).triu(2).bool()
        far.append(float(cosine[apart].mean()))
    return statistics.mean(near), statistics.mean(far)


def seconds_by_last_step(task: Task, time_steps: int, k: int) -> Callable[[Tensor], Tensor]:
    """The CPU time of an iteration as a line over its forward steps, fitted to medians of runs in turns."""
    torch.manual_seed(0)
    net = task.network()
    x, target = (part[:BATCH] for part in task.data(time_steps))

    def run(online: sltt_ext.OnlineTrainer) -> None:
        net.zero_grad()
        online.forward_backward(x, target)

    runs: dict[str, Callable[[], Any]] = {}
    ends = range(k, time_steps + 1)
    for end in ends:
        online = task.trainer(
            net,
            time_steps,
            schedule=lambda *_, end=end: [*range(k - 1), end - 1],
            full_output=False,
        )
        runs[str(end)] = partial(run, online)
    medians = torch.tensor([*interleaved_medians(runs, REPEATS, time.process_time).values()]).double()
    steps = torch.tensor([*ends]).double()
    away = steps - steps.mean()
    slope = (away * medians).sum() / away.square().sum()
    return lambda forward_steps: medians.mean() + slope * (forward_steps - steps.mean())


def measure() -> list[dict[str, Any]]:
    rows = []
    for task in TASKS:
        for time_steps, ks in ((6, (1, 2)), (8, (2, 3))):
            products: dict[str, list[Tensor]] = {"fresh": [], "trained": []}
            for seed in SEEDS:
                torch.manual_seed(seed)
                net = task.network()
                products["fresh"] += products_of_gradients(task, net, time_steps, seed)
                train(task, net, time_steps, seed)
                products["trained"] += products_of_gradients(task, net, time_steps, seed)
            for k in ks:
                rows += rows_of(task, time_steps, k, products)
                print(*rows[-6:], sep="\n", flush=True)
    return rows


def rows_of(task: Task, time_steps: int, k: int, products: dict[str, list[Tensor]]) -> list[dict[str, Any]]:
    weights = {name: weights_of_draws(name, k, time_steps) for name in DRAWS}
    order = torch.arange(1, time_steps + 1)
    steps = {name: (own > 0).double().mul(order).amax(1).mean() for name, own in weights.items()}
    seconds = seconds_by_last_step(task, time_steps, k)
    rows = []
    for state, found in products.items():
        variances = {
            name: statistics.mean(variance(own, each) for each in found) for name, own in weights.items()
        }
        near, far = cosines(found)
        for name in weights:
            rows.append(
                {
                    "network": task.name,
                    "state": state,
                    "time_steps": time_steps,
                    "k": k,
                    "schedule": name,
                    "variance": round(variances[name], 4),
                    "relative_variance": round(variances[name] / variances["random"], 3),
                    "forward_steps": round(float(steps[name]), 2),
                    "relative_seconds": round(float(seconds(steps[name]) / seconds(steps["random"])), 3),
                    "cosine_of_neighbours": round(near, 3),
                    "cosine_of_others": round(far, 3),
                    "batches": len(found),
                    "draws": DRAWN,
                }
            )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    write_results("draws", measure(), show=False)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
