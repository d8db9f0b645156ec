"""What the demo trains, and how: a plain SpikingJelly network, with every method that is compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.data import Digits
from sltt_ext.methods import COMPARED, GradientTrainer, Method, method_named
from sltt_ext.optional import require

__all__ = ["METHODS", "DemoSettings", "MethodResult", "Training", "network", "peak_bytes", "seconds_needed"]

METHODS: dict[str, Method] = {method.name: method for method in map(method_named, COMPARED)}
"""Name -> method."""
_WITH_TESTS = 1.2
"""What the tests after each epoch and the optimizer add to the time."""


@dataclass(frozen=True)
class DemoSettings:
    """The settings all methods share."""

    epochs: int = 10
    seed: int = 0
    time_steps: int = 6
    batch_size: int = 64
    learning_rate: float = 2e-3
    channels: int = 32
    device: str = "cpu"
    memory_time_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)

    def quick(self) -> DemoSettings:
        """A smaller network, trained for two epochs."""
        return replace(self, epochs=2, channels=16, memory_time_steps=(1, 4, 16))


@dataclass
class MethodResult:
    """What one method reached.

    Attributes:
        accuracy: Test accuracy after each epoch, from 0 to 1.
        seconds: Training time of each epoch.
        peak_bytes: Number of time steps T -> peak activation bytes of one training iteration.
    """

    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: dict[int, int] = field(default_factory=dict)

    @property
    def seconds_per_epoch(self) -> float:
        """The median epoch's time."""
        return sorted(self.seconds)[len(self.seconds) // 2]


def network(channels: int) -> nn.Module:
    """A small convolutional spiking network, as a SpikingJelly user writes it; single-step.

    Shape: ``[N, 1, 8, 8]`` to ``[N, 10]``.
    """
    layer: Any = require("spikingjelly.activation_based.layer", extra="demo")
    neuron: Any = require("spikingjelly.activation_based.neuron", extra="demo")
    surrogate: Any = require("spikingjelly.activation_based.surrogate", extra="demo")

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            layer.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            layer.BatchNorm2d(outputs),
            neuron.LIFNode(decay_input=False, v_reset=None, surrogate_function=surrogate.ATan()),
        ]

    return nn.Sequential(
        *block(1, channels),
        *block(channels, 2 * channels),
        layer.MaxPool2d(2),
        *block(2 * channels, 2 * channels),
        layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(8 * channels, 10),
    )


class Training:
    """One method's training, epoch by epoch. Seeds and settings are the same for all methods."""

    def __init__(self, method: Method, settings: DemoSettings, data: Digits) -> None:
        self.settings = settings
        self.data = data
        self.result = MethodResult()
        torch.manual_seed(settings.seed)
        self.net = network(settings.channels).to(settings.device)
        self.trainer = _trainer(method, self.net, settings.time_steps)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=settings.learning_rate)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, settings.epochs * batches_per_epoch(settings, data)
        )
        self.order = torch.Generator().manual_seed(settings.seed)

    def epoch(self, on_batch: Callable[[], None]) -> None:
        """Train one epoch, then test."""
        self.net.train()
        indices = torch.randperm(len(self.data.train_labels), generator=self.order)
        start = time.perf_counter()
        for batch in indices.to(self.settings.device).split(self.settings.batch_size):
            self.optimizer.zero_grad()
            self.trainer.forward_backward(self.data.train_images[batch], self.data.train_labels[batch])
            self.optimizer.step()
            self.scheduler.step()
            on_batch()
        if self.settings.device != "cpu":
            torch.cuda.synchronize()
        self.result.seconds.append(time.perf_counter() - start)
        self.result.accuracy.append(self.test())

    @torch.no_grad()
    def test(self) -> float:
        """Accuracy on the test images, by the output averaged over time."""
        self.net.eval()
        correct = self.trainer.predict(self.data.test_images).argmax(1) == self.data.test_labels
        return correct.float().mean().item()


def _trainer(method: Method, net: nn.Module, time_steps: int) -> GradientTrainer:
    return method.for_at_most(time_steps).trainer(net, F.cross_entropy, time_steps)


def batches_per_epoch(settings: DemoSettings, data: Digits) -> int:
    """Number of iterations in an epoch."""
    return -(-len(data.train_labels) // settings.batch_size)


def seconds_needed(settings: DemoSettings, data: Digits) -> float:
    """About how long the whole comparison will take, from the second of two batches of each method."""
    batch = slice(settings.batch_size)
    needed = 0.0
    for method in METHODS.values():
        training = Training(method, settings, data)
        for _ in range(2):
            start = time.perf_counter()
            training.trainer.forward_backward(data.train_images[batch], data.train_labels[batch])
            if settings.device != "cpu":
                torch.cuda.synchronize()
            iteration = time.perf_counter() - start
        needed += iteration * settings.epochs * batches_per_epoch(settings, data)
        needed += iteration * sum(settings.memory_time_steps) / settings.time_steps
    return needed * _WITH_TESTS


def peak_bytes(
    method: Method, settings: DemoSettings, data: Digits, time_steps: Sequence[int]
) -> dict[int, int]:
    """Peak activation bytes of one training iteration, for each number of time steps."""
    x, target = data.train_images[: settings.batch_size], data.train_labels[: settings.batch_size]
    peaks = {}
    for steps in time_steps:
        net = network(settings.channels).to(settings.device)
        trainer = _trainer(method, net, steps)
        peaks[steps] = peak_activation_bytes(partial(trainer.forward_backward, x, target), net)
    return peaks
