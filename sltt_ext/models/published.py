"""Checkpoints of the published SLTT code: ``{"net": state_dict, ...}``, with its parameter names.

The names differ from ours if a weight is parametrised: ``conv1.weight`` and ``conv1.gain`` there are
``conv1.parametrizations.weight.original`` and ``conv1.parametrizations.weight.0.gain`` here. A block's ``skipinit_gain``
there is a factor of the weight and bias of its last convolution here. The first convolution of a normaliser-free ResNet is
``stem.0`` here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sltt_ext.checkpoint import read_checkpoint
from sltt_ext.errors import CheckpointError
from sltt_ext.models.neurons import Neuron, paper_lif
from sltt_ext.models.registry import MODELS

__all__ = ["load_published_checkpoint"]

State = Mapping[str, Tensor]

_RENAMED = (
    (re.compile(r"^stem\.0\."), "conv1."),
    (re.compile(r"\.conv\d\.parametrizations\.(weight\.0\.skip|bias\.0)\.gain$"), ".skipinit_gain"),
    (re.compile(r"\.parametrizations\.weight\.0\.gain$"), ".gain"),
    (re.compile(r"\.parametrizations\.(weight|bias)\.original$"), r".\1"),
)
_SHOWN = 3


def load_published_checkpoint(
    path: str | Path, net: nn.Module | None = None, *, neuron: Neuron = paper_lif
) -> nn.Module:
    """Load weights that the published SLTT code saved.

    Args:
        path: The file.
        net: A network of this package into which to load the weights. None makes the network that fits them, with its
            number of classes, input channels and width.
        neuron: The neuron of a network that is made here.

    Returns:
        The network.

    Raises:
        CheckpointError: If the file cannot be read or is in another layout, or if its weights belong to another
            network. ``net`` is then as before.
    """
    state = _read(Path(path))
    recognised = _recognise(state)
    if net is None:
        if recognised is None:
            raise CheckpointError(
                f"{path} fits none of the networks {', '.join(MODELS)}: give the network as net="
            )
        name, options = recognised
        net = MODELS[name](neuron=neuron, **options)
    differences = _differences(_published_shapes(net), state)
    if differences:
        is_of = f"; it is from a {recognised[0]}" if recognised else ""
        raise CheckpointError(
            f"{path} does not fit {type(net).__name__}{is_of}: {'; '.join(differences)}. Make the network that it is from, "
            "with the same number of classes, or leave net out"
        )
    net.load_state_dict({name: state[published_name(name)] for name in net.state_dict()})
    return net


def _read(path: Path) -> State:
    content = read_checkpoint(path)
    state = content.get("net") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path} is not in the layout of the published code, {{'net': state_dict, ...}}; for other layouts "
            "use net.load_state_dict"
        )
    return state


def published_name(name: str) -> str:
    """The published name of one of our parameters or buffers."""
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _published_shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {published_name(name): tensor.shape for name, tensor in net.state_dict().items()}


def _recognise(state: State) -> tuple[str, dict[str, int]] | None:
    """The name of the network with these weights, and the arguments with which to make it."""
    weights = [tensor for name, tensor in state.items() if name.endswith(".weight")]
    convolutions = [weight for weight in weights if weight.dim() == 4]
    linears = [weight for weight in weights if weight.dim() == 2]
    if not convolutions or len(linears) != 1:
        return None
    width, in_channels = convolutions[0].shape[:2]
    options = {"num_classes": linears[0].shape[0], "in_channels": in_channels, "width": width}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for name, factory in MODELS.items():
        with torch.device("meta"):
            if _published_shapes(factory(**options)) == shapes:
                return name, options
    return None


def _differences(expected: Mapping[str, torch.Size], state: State) -> list[str]:
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    other = [
        f"{name} is {list(state[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    return [
        what + ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for what, names in (("it lacks ", missing), ("it also has ", unknown), ("", other))
        if names
    ]
