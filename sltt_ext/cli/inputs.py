"""The network and the batches that a command line asks for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sltt_ext.analysis.analyze import check_runs
from sltt_ext.cli.arguments import checked_device
from sltt_ext.cli.factory import build
from sltt_ext.errors import ConfigurationError, InputError, one_line

__all__ = ["Batch", "network", "random_batches", "read_output", "saved_batches"]

Batch = tuple[Tensor, Tensor]


def network(options: argparse.Namespace) -> nn.Module:
    """The network of ``MODULE:FACTORY`` on the device, made with the seed."""
    device = checked_device(options.device)
    torch.manual_seed(options.seed)
    return build(options.factory).to(device)


def random_batches(
    options: argparse.Namespace, net: nn.Module, count: int, classes: int | None = None
) -> list[Batch]:
    """Uniform random inputs from 0 to 1, and random class indices.

    Raises:
        ConfigurationError: If there is no input shape.
        InputError: If the network rejects it, or if its output is not ``[N, classes]``.
    """
    if options.input_shape is None:
        data = ", or --data FILE.pt" if hasattr(options, "data") else ""
        raise ConfigurationError(f"give --input-shape, such as 3,64,64{data}")
    device = checked_device(options.device)
    shape = (options.batch, *options.input_shape)
    torch.manual_seed(options.seed)
    inputs = [torch.rand(shape, device=device) for _ in range(count)]
    try:
        outputs = _classes(net, inputs[0], options)
    except InputError as error:
        if len(options.input_shape) < 4:
            raise
        raise InputError(
            f"{error}; --input-shape has {len(options.input_shape)} numbers: leave out the batch, which is --batch"
        ) from error
    if classes is not None and classes > outputs:
        raise InputError(f"--classes {classes}: the network has {outputs} outputs")
    return [(x, torch.randint(classes or outputs, (options.batch,), device=device)) for x in inputs]


def saved_batches(path: Path, options: argparse.Namespace, net: nn.Module, count: int) -> list[Batch]:
    """The first batches of ``(x, target)`` in a file written by ``torch.save``.

    Raises:
        InputError: If the file holds something else, or something that the network or the loss cannot take.
    """
    try:
        loaded: Any = torch.load(path, map_location=checked_device(options.device), weights_only=True)
    except FileNotFoundError:
        raise InputError(f"--data: there is no file {path}") from None
    except Exception as error:  # pickle raises whatever it likes
        raise InputError(f"--data {path} cannot be loaded: {one_line(error)}") from error
    pair = isinstance(loaded, (tuple, list)) and len(loaded) == 2
    if not pair or not all(isinstance(part, Tensor) and part.dim() for part in loaded):
        raise InputError(f"--data {path} must have a pair of tensors, torch.save((x, target), {path.name!r})")
    x, target = loaded
    dim = 1 if options.time_dim == 0 else 0
    if x.dim() <= dim or x.shape[dim] != len(target) or not len(target):
        raise InputError(
            f"--data {path}: x of shape {list(x.shape)} and target of shape {list(target.shape)} disagree on the number "
            "of samples" + (" (time_dim=0: x is [T, N, ...])" if dim else "")
        )
    size = min(options.batch, len(target))
    batches = list(zip(x.split(size, dim), target.split(size)))
    outputs = _classes(net, batches[0][0], options)
    try:  # on the CPU: after a wrong index on a CUDA device, the process can no longer use it
        F.cross_entropy(torch.zeros(len(target), outputs), target.cpu())
    except Exception as error:  # PyTorch's own, of several kinds
        raise InputError(
            f"--data {path}: cross-entropy cannot take the target ({one_line(error)}): it needs int64 "
            f"classes from 0 to {outputs - 1}, one for each sample, or float32 probabilities [N, {outputs}]"
        ) from error
    return [batch for batch in batches if len(batch[1]) == size][:count]


def _classes(net: nn.Module, x: Tensor, options: argparse.Namespace) -> int:
    """The number of classes of the network's output ``[N, classes]``.

    Raises:
        InputError: If the network rejects ``x``, or if its output has another shape.
    """
    output = check_runs(net, x, options.time_steps, getattr(options, "time_dim", None), read_output(options))
    if output.dim() != 2:
        raise InputError(
            f"the network's output at one step has shape {list(output.shape)}, cross-entropy needs [N, classes]: name a "
            "factory whose network returns that, or call sltt_ext.analysis with your own loss"
        )
    return output.shape[1]


def read_output(options: argparse.Namespace) -> Literal["membrane"] | None:
    """What the loss reads of the network's outputs, as `OnlineTrainer` takes it."""
    return "membrane" if options.membrane else None
