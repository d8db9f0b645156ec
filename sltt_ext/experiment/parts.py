"""The parts of a run: its data set, its network, and its first weights."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sltt_ext.checkpoint import read_checkpoint
from sltt_ext.data import DATA_SETS
from sltt_ext.errors import CheckpointError, ConfigurationError
from sltt_ext.experiment.settings import Experiment
from sltt_ext.models import MODELS, load_published_checkpoint

if TYPE_CHECKING:
    from sltt_ext.data.module import DataModule

__all__ = ["Build", "check_classes", "data_module", "load_weights", "named_network"]

Build = Callable[[Experiment, "DataModule"], nn.Module]


def data_module(experiment: Experiment, options: dict[str, Any]) -> DataModule:
    """The data set that an experiment names, with further ``options`` of the data set."""
    make = DATA_SETS[experiment.data]
    if make.time_dim is not None:
        options = {**options, "time_steps": experiment.time_steps}
    return make(
        experiment.data_dir,
        batch_size=experiment.batch_size,
        workers=experiment.workers,
        on_corrupt=experiment.on_corrupt,
        **options,
    )


def named_network(experiment: Experiment, data: DataModule) -> nn.Module:
    """The network that an experiment names, for the classes and channels of its data.

    Raises:
        ConfigurationError: If there is no network of that name, or if the experiment has dropout and the network has none.
    """
    if experiment.network not in MODELS:
        raise ConfigurationError(f"network must be one of {', '.join(MODELS)}, got {experiment.network!r}")
    make = MODELS[experiment.network]
    options: dict[str, Any] = {"in_channels": data.in_channels, "width": experiment.width}
    if experiment.dropout:
        if "dropout" not in signature(make).parameters:
            raise ConfigurationError(f"{experiment.network} has no dropout: leave it out")
        options["dropout"] = experiment.dropout
    return make(data.num_classes, **options)


def check_classes(net: nn.Module, data: DataModule) -> None:
    """Raise `ConfigurationError` unless the network's last linear layer has an output for each class."""
    outputs = [module.out_features for module in net.modules() if isinstance(module, nn.Linear)]
    if outputs and outputs[-1] != data.num_classes:
        raise ConfigurationError(
            f"{type(net).__name__} has {outputs[-1]} outputs, {data.title} has {data.num_classes} classes: "
            f"make the network with num_classes={data.num_classes}"
        )


def load_weights(path: Path, net: nn.Module) -> None:
    """Load the weights of a checkpoint of `run`, or of the published code.

    Raises:
        CheckpointError: If the file cannot be read, or is from another network.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        load_published_checkpoint(path, net)
        return
    state = {name.removeprefix("net."): value for name, value in content["state_dict"].items()}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is from another network than {type(net).__name__}: {error}") from error
