"""The run itself: train a network on a data set with the settings, and save checkpoints.

Lightning does the rest: devices and processes, mixed precision, progress, TensorBoard, checkpoints.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sltt_ext.data import DATA_SETS
from sltt_ext.errors import CheckpointError, ConfigurationError, SLTTError
from sltt_ext.experiment.parts import Build, check_classes, data_module, load_weights, named_network
from sltt_ext.experiment.settings import Experiment, from_command_line
from sltt_ext.lightning import NetworkMonitor, OnlineModule
from sltt_ext.online import CrossEntropyMSELoss
from sltt_ext.online.options import TimeDim
from sltt_ext.optional import require

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    pl = require("lightning.pytorch", extra="train")

__all__ = ["ExperimentModule", "main", "run"]

SMOKE: dict[str, Any] = {
    "width": 8,
    "batch_size": 4,
    "precision": "32-true",
    "accelerator": "cpu",
    "workers": 0,
}
"""The settings that a smoke run changes, so that it ends soon on any machine."""
SMOKE_BATCHES = 3


def main(
    description: str,
    build: Build | None = None,
    arguments: list[str] | None = None,
) -> dict[str, float]:
    """Run the experiment that the command line asks for. An error that the user can fix ends it with its message.

    Args:
        description: Description of the script, for ``--help``.
        build: Makes the network from the settings and the data set; default `named_network`.
        arguments: The command line; None is the program's own.

    Returns:
        The metrics that were logged last.
    """
    try:
        return run(from_command_line(description, arguments), build)
    except SLTTError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def run(experiment: Experiment, build: Build | None = None) -> dict[str, float]:
    """Train, or evaluate, and return the metrics that were logged last.

    Raises:
        ConfigurationError: If settings do not fit each other.
        CheckpointError: If a checkpoint is missing, cannot be read, or is from another network.
        DataError: If the data set is absent or damaged.
    """
    last = experiment.folder / "last.ckpt"
    if experiment.resume and not last.is_file():
        raise CheckpointError(f"there is nothing to resume: {last} does not exist; leave --resume out")
    if last.is_file() and not (experiment.resume or experiment.evaluate or experiment.smoke):
        raise CheckpointError(
            f"{last} is from an earlier run with these settings: --resume continues it, another --output starts a new one"
        )
    if experiment.data not in DATA_SETS:
        raise ConfigurationError(f"data must be one of {', '.join(DATA_SETS)}, got {experiment.data!r}")
    if experiment.smoke:
        from sltt_ext.data.tiny import write_tiny

        experiment = replace(experiment, **SMOKE, epochs=1 + experiment.resume)
        with TemporaryDirectory(prefix="sltt-smoke-") as root:
            options = write_tiny(experiment.data, root)
            return _run(replace(experiment, data_dir=Path(root)), build or named_network, options)
    return _run(experiment, build or named_network, {})


def _run(experiment: Experiment, build: Build, data_options: dict[str, Any]) -> dict[str, float]:
    pl.seed_everything(experiment.seed, workers=True, verbose=False)
    data = data_module(experiment, data_options)
    net = build(experiment, data)
    check_classes(net, data)
    module = ExperimentModule(experiment, net, data.time_dim)
    weights = experiment.evaluate or experiment.pretrained
    if weights is not None:
        load_weights(weights, net)
    trainer = pl.Trainer(
        accelerator=experiment.accelerator,
        devices=experiment.devices,
        strategy="ddp" if experiment.devices > 1 else "auto",
        precision=experiment.precision,
        max_epochs=experiment.epochs,
        log_every_n_steps=1 if experiment.smoke else 50,
        limit_train_batches=SMOKE_BATCHES if experiment.smoke else None,
        limit_val_batches=SMOKE_BATCHES if experiment.smoke else None,
        logger=pl.loggers.TensorBoardLogger(experiment.folder, name="", version=""),
        callbacks=[
            pl.callbacks.ModelCheckpoint(
                experiment.folder,
                filename="best",
                monitor="val_accuracy",
                mode="max",
                save_last=True,
                enable_version_counter=False,
            ),
            NetworkMonitor(),
        ],
    )
    if experiment.evaluate is not None:
        trainer.validate(module, data)
    else:
        trainer.fit(module, data, ckpt_path=experiment.folder / "last.ckpt" if experiment.resume else None)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class ExperimentModule(OnlineModule):
    """The network with the method and the optimizer of an experiment.

    Args:
        experiment: The settings.
        net: The network.
        time_dim: The time axis of the input, as in `OnlineTrainer`.
    """

    def __init__(self, experiment: Experiment, net: nn.Module, time_dim: TimeDim | None) -> None:
        loss_fn = CrossEntropyMSELoss(experiment.mse_weight, experiment.mse_target)
        method = experiment.chosen_method
        super().__init__(method.trainer(net, loss_fn, experiment.time_steps, time_dim=time_dim))
        self.experiment = experiment

    def on_train_epoch_start(self) -> None:
        """Start each epoch's random streams anew, so that a resumed run continues as if it had never been interrupted."""
        epoch_and_process = self.current_epoch * self.trainer.world_size + self.trainer.global_rank
        torch.manual_seed(self.experiment.seed + 1 + epoch_and_process)

    def configure_optimizers(self) -> Any:
        """The optimizer of the paper: SGD with momentum, and cosine annealing over the epochs."""
        optimizer = torch.optim.SGD(
            self.net.parameters(),
            self.experiment.learning_rate,
            momentum=0.9,
            weight_decay=self.experiment.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.experiment.epochs)
        return [optimizer], [schedule]
