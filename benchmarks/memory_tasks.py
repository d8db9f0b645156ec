"""Tasks that need memory, by BPTT, SLTT, and windows between them: `results/memory_tasks.csv`.

python benchmarks/memory_tasks.py accuracy
python benchmarks/memory_tasks.py similarity        of SLTT's and BPTT's gradient before training: `memory_tasks_similarity.csv`

There are two kinds of tasks. In store and recall, one of four cues is shown for one step, noise follows, and after a delay a
signal asks which cue it was. Noise also comes before: the sequence is twice as long as a window that holds cue and question. The
other tasks are scikit-learn's digits, shown row by row or pixel by pixel. In all tasks the loss reads only the output of the last
step. So only the window that ends with it is back-propagated.

The networks are snnTorch's. For each seed all methods have the same weights at the start and the same batches. Each run is a
row, which is appended as soon as it is there. Runs that are in the file are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import snntorch
import torch
from accuracy import append, recorded
from measure import RESULTS, version_of, write_results
from snntorch import surrogate
from torch import Tensor, nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import gradient_similarity, peak_activation_bytes
from sltt_ext.analysis.timing import device_name
from sltt_ext.bptt import BPTTTrainer
from sltt_ext.data import load_digits
from sltt_ext.methods import GradientTrainer

CUES, NOISE, NOISE_RATE = 4, 8, 0.4
HIDDEN, BATCH, TEST, SEEDS = 64, 64, 1000, 5
UNASKED = -1
"""The target of a step whose output no loss reads."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A task, and the network that learns it.

    Attributes:
        name: Its name in the table.
        neuron: The neuron's name in the table.
        network: Makes the network, of single steps.
        train: ``generator -> `` a batch, input ``[T, N, ...]`` and class ``[N]``.
        test: The test set, likewise.
        time_steps: T.
        windows: Numbers of steps between SLTT's 1 and T that are back-propagated together.
        iterations: How many iterations of training there are, by Adam.
        learning_rate: Adam's learning rate.
    """

    name: str
    neuron: str
    network: Callable[[], nn.Module]
    train: Callable[[torch.Generator], Batch]
    test: Callable[[], Batch]
    time_steps: int
    windows: tuple[int, ...]
    iterations: int
    learning_rate: float = 5e-3

    @property
    def methods(self) -> dict[str, int | None]:
        """Name -> window; None is BPTT."""
        return {"BPTT": None, "SLTT": 1, **{f"window {size}": size for size in self.windows}}


def covering_window(delay: int) -> int:
    """The least multiple of 4 that holds cue, delay and question; its halves do not hold both."""
    return -(-(delay + 2) // 4) * 4


def store_and_recall(samples: int, delay: int, generator: torch.Generator) -> Batch:
    """Sequences ``[T, N, 13]`` of cue channels, noise channels and one channel that asks, and the cues ``[N]``."""
    time_steps = 2 * covering_window(delay)
    cue = torch.randint(CUES, (samples,), generator=generator)
    x = torch.zeros(time_steps, samples, CUES + NOISE + 1)
    x[..., CUES:-1] = (torch.rand(time_steps, samples, NOISE, generator=generator) < NOISE_RATE).float()
    x[time_steps - delay - 2, torch.arange(samples), cue] = 1
    x[-1, :, -1] = 1
    return x, cue


def leaky() -> nn.Module:
    """A network that forgets slowly. It has no reset: noise would reset what membranes keep."""
    return snntorch.Leaky(
        beta=0.98,
        reset_mechanism="none",
        init_hidden=True,
        spike_grad=surrogate.fast_sigmoid(slope=5),
    )


def recurrent() -> nn.Module:
    """A network with recurrent weights, which start half as large as snnTorch's."""
    neuron = snntorch.RLeaky(
        beta=0.9,
        linear_features=HIDDEN,
        init_hidden=True,
        spike_grad=surrogate.fast_sigmoid(slope=5),
    )
    with torch.no_grad():
        for parameter in neuron.recurrent.parameters():
            parameter.mul_(0.5)
    return neuron


def network(inputs: int, neuron: Callable[[], nn.Module], classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), neuron(), nn.Linear(HIDDEN, classes))


def recall_task(delay: int, neuron: str, iterations: int, learning_rate: float) -> Task:
    neurons = {"Leaky": leaky, "RLeaky": recurrent}
    window = covering_window(delay)
    return Task(
        f"store and recall, delay {delay}",
        neuron,
        partial(network, CUES + NOISE + 1, neurons[neuron], CUES),
        partial(store_and_recall, BATCH, delay),
        lambda: store_and_recall(TEST, delay, torch.Generator().manual_seed(1_000_000)),
        2 * window,
        (window // 2, window),
        iterations,
        learning_rate,
    )


def by_row(images: Tensor) -> Tensor:
    """Images ``[N, 1, 8, 8]`` as sequences ``[8, N, 8]``."""
    return images[:, 0].transpose(0, 1)


def by_pixel(images: Tensor) -> Tensor:
    """Images ``[N, 1, 8, 8]`` as sequences ``[64, N, 64]``: each pixel at its own step, through its own input."""
    return torch.diag_embed(images.flatten(1)).transpose(0, 1)


def digits_task(shown: Callable[[Tensor], Tensor], windows: tuple[int, int], iterations: int) -> Task:
    """scikit-learn's digits, a part at each step."""
    data = load_digits()
    train, test = shown(data.train_images), shown(data.test_images)

    def batch(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(data.train_labels), (BATCH,), generator=generator)
        return train[:, chosen], data.train_labels[chosen]

    part = shown.__name__.removeprefix("by_")
    return Task(
        f"digits {part} by {part}",
        "Leaky",
        partial(network, train.shape[-1], leaky, 10),
        batch,
        lambda: (test, data.test_labels),
        len(train),
        windows,
        iterations,
    )


def tasks() -> tuple[Task, ...]:
    return (
        *(recall_task(delay, "Leaky", 250, 5e-3) for delay in (5, 10, 20)),
        recall_task(10, "RLeaky", 700, 2e-3),
        digits_task(by_row, (2, 4), 600),
        digits_task(by_pixel, (16, 32), 300),
    )


def asked_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy where a class is asked, 0 elsewhere."""
    return F.cross_entropy(output, target, ignore_index=UNASKED, reduction="sum") / len(target)


def asked_at_the_end(cls: Tensor, time_steps: int) -> Tensor:
    """Targets ``[T, N]``."""
    return torch.cat([torch.full((time_steps - 1, len(cls)), UNASKED), cls.unsqueeze(0)])


def trainer(net: nn.Module, time_steps: int, window: int | None) -> GradientTrainer:
    """BPTT, or SLTT with windows. Both have the same loss, which SLTT back-propagates only within the last window."""
    if window is None:
        return BPTTTrainer(net, asked_loss, time_steps, time_dim=0, target_time_dim=0)
    sltt_ext.convert(net, temporal="step" if window == 1 else "call")
    return sltt_ext.OnlineTrainer(
        net, asked_loss, time_steps, chunk=window, scale="paper",
        schedule=lambda t, _: range(t - window, t), time_dim=0, target_time_dim=0,
    )  # fmt: skip


@torch.no_grad()
def accuracy(net: nn.Module, x_seq: Tensor, cls: Tensor) -> float:
    """The accuracy of the last step's output."""
    for module in net.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            module.reset_mem()
    for x in x_seq:
        output = net(x)
    return (output.argmax(1) == cls).float().mean().item()


def run(task: Task, window: int | None, seed: int) -> dict[str, float]:
    """Train, and return the test accuracy, the seconds of all iterations, and the peak activations of one."""
    torch.manual_seed(seed)
    net = task.network()
    online = trainer(net, task.time_steps, window)
    optimizer = torch.optim.Adam(net.parameters(), lr=task.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    seconds = 0.0
    for _ in range(task.iterations):
        x_seq, cls = task.train(generator)
        target = asked_at_the_end(cls, task.time_steps)
        start = time.perf_counter()
        optimizer.zero_grad()
        online.forward_backward(x_seq, target)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        seconds += time.perf_counter() - start
    peak = peak_activation_bytes(partial(online.forward_backward, x_seq, target), net)
    return {
        "test_accuracy": round(accuracy(net, *task.test()), 4),
        "seconds": round(seconds, 2),
        "peak_activation_kb": round(peak / 1e3, 1),
    }


def similarity() -> Iterator[dict[str, Any]]:
    """Similarity of SLTT's and BPTT's gradient before training: all parameters, and the layer that reads the input."""
    for task in tasks():
        cosines = []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            x_seq, cls = task.train(torch.Generator().manual_seed(seed))
            target = asked_at_the_end(cls, task.time_steps)
            found = gradient_similarity(
                task.network(), x_seq, target, asked_loss, task.time_steps, time_dim=0, target_time_dim=0
            )
            layers = {layer.name: layer.cosine for layer in found.select("layer")}
            cosines.append((found.overall.cosine, layers["0"]))
        overall, first = map(statistics.mean, zip(*cosines, strict=True))
        yield {
            "task": task.name,
            "neuron": task.neuron,
            "time_steps": task.time_steps,
            "seeds": SEEDS,
            "cosine": round(overall, 3),
            "cosine_of_first_layer": round(first, 3),
        }


def accuracies() -> None:
    path = RESULTS / "memory_tasks.csv"
    done = recorded(path, ("task", "neuron", "method", "seed"))
    for seed in range(SEEDS):
        for task in tasks():
            for method, window in task.methods.items():
                if (task.name, task.neuron, method, str(seed)) in done:
                    continue
                append(
                    path,
                    {
                        "task": task.name,
                        "neuron": task.neuron,
                        "time_steps": task.time_steps,
                        "method": method,
                        "seed": seed,
                        **run(task, window, seed),
                        "iterations": task.iterations,
                        "device": device_name(),
                        "torch": torch.__version__,
                        "snntorch": version_of("snntorch"),
                    },
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["accuracy", "similarity"])
    torch.set_num_threads(1)
    if parser.parse_args().what == "accuracy":
        accuracies()
    else:
        write_results("memory_tasks_similarity", similarity(), framework="snntorch")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
