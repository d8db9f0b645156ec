"""What to do about errors of a network or loss that was written to run in another way.

Layers and losses raise these errors far from the mistake. They are explained if the shapes show what it may be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from sltt_ext.errors import InputError, LossError, SLTTError, is_out_of_memory, one_line

__all__ = ["explaining_losses", "explaining_steps"]

_OF_SHAPES = re.compile(r"\bdim|shape|size|elements|\dD\b", re.IGNORECASE)
_OF_ONE_SAMPLE = "more than 1 value per channel"  # which says all there is to say
_LAYERS = (_ConvNd, _BatchNorm, _AvgPoolNd, _MaxPoolNd)


@contextmanager
def explaining_steps(
    net: nn.Module, x: Any, time_steps: int, time_dim: int | None, multi_step: bool
) -> Iterator[None]:
    """Say why ``net`` may have failed on ``x``.

    Raises:
        InputError: In the place of an error about shapes.
    """
    try:
        yield
    except SLTTError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        if is_out_of_memory(error) or not _OF_SHAPES.search(str(error)) or _OF_ONE_SAMPLE in str(error):
            raise
        causes = [*_axis_of_time(x, time_steps, time_dim), *(_one_step_layers(net) if multi_step else [])]
        if time_dim is not None and isinstance(x, Tensor) and x.dim() < 5 and not causes:
            causes = [
                f"time_dim={time_dim} takes axis {time_dim} of x {list(x.shape)} for time: if x has no axis of time, as images [N, C, H, W], "
                "leave time_dim out, and give time_steps; if forward goes through the steps of x itself, use sltt_ext.over_time(net, "
                "time_inside='x', time_dim=0)"
            ]
        if multi_step and time_dim is None and not causes:
            causes = [
                "the trainer calls a multi-step network with [T, N, ...], time first: a forward that repeats x over time "
                "itself has to leave that out"
            ]
        if not causes:
            raise
        raise InputError(f"a time step failed ({one_line(error)}): {', or '.join(causes)}") from error


@contextmanager
def explaining_losses(output: Any, target: Any) -> Iterator[None]:
    """Say why a loss may have failed on the output of one step.

    Raises:
        LossError: In the place of its error, where the batch is not in front, or the target has an axis of time.
    """
    try:
        yield
    except SLTTError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        if is_out_of_memory(error) or not (isinstance(output, Tensor) and isinstance(target, Tensor)):
            raise
        if output.dim() and target.dim() > 1 and target.shape[0] != len(output) == target.shape[1]:
            raise LossError(
                f"the loss failed ({one_line(error)}), and the target {list(target.shape)} has the batch on axis 1: if its first axis is "
                "time, say target_time_dim=0"
            ) from error
        if not target.dim() or output.dim() < 2 or output.shape[1] != len(target):
            raise
        raise LossError(
            f"the loss failed ({one_line(error)}), and the output of one step, {list(output.shape)}, has the batch on axis 1: if "
            "x has its time in front, say time_dim=0; if forward loops over time itself, have it run one step (wrap a "
            "forward(x, state) in sltt_ext.snntorch.Stateful)"
        ) from error


def _axis_of_time(x: Any, time_steps: int, time_dim: int | None) -> list[str]:
    if time_dim is not None or not isinstance(x, Tensor) or x.dim() < 3 or time_steps not in x.shape[:2]:
        return []
    axis = list(x.shape).index(time_steps)
    return [
        f"if axis {axis} of x {list(x.shape)} is time, say time_dim={axis}: without it, all of x is shown at every step"
    ]


def _one_step_layers(net: nn.Module) -> list[str]:
    """Layers for single steps, in a network whose neurons' ``step_mode`` is 'm'."""
    modes = {path: getattr(module, "step_mode", None) for path, module in net.named_modules()}
    layers = dict(net.named_modules())
    single = [path for path, layer in layers.items() if isinstance(layer, _LAYERS) and modes[path] != "m"]
    if "m" not in modes.values() or not single:
        return []
    return [
        f"neurons take sequences (step_mode 'm') and {single[0]!r}, a {type(layers[single[0]]).__name__}, takes single steps: "
        "build the network with spikingjelly's layer.Conv2d etc., and functional.set_step_mode(net, 'm')"
    ]
