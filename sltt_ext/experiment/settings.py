"""The settings of a run, from a configuration file and the command line. Each row of the paper's tables has a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sltt_ext.methods import Method, method_named
from sltt_ext.online.options import UNASKED
from sltt_ext.optional import require

__all__ = ["Experiment", "from_command_line"]

FLAGS = {
    "resume": "continue from the run's last checkpoint in the output folder",
    "smoke": "a quick trial: one epoch of a few batches, with a narrow network and a tiny made-up set in the original file format",
}


@dataclass(frozen=True)
class Experiment:
    """Settings of one run.

    Args:
        data: Name of the data set.
        network: Name of the network.
        time_steps: T.
        epochs: Number of passes through the training set.
        batch_size: Samples of a batch, for each process.
        learning_rate: Learning rate of SGD with momentum 0.9. It falls to zero over the epochs along a cosine.
        weight_decay: Weight decay of SGD.
        method: bptt, sltt, or sltt-k.
        k: How many of the T steps sltt-k back-propagates.
        schedule: How sltt-k draws them: random, stratified (one of each k-th of the T steps), or early (late steps less often).
        scale: Whether the sum of the losses of sltt-k is divided by their number (mean) or by T (paper).
        chunk: How many back-propagated steps of sltt and sltt-k share a call of the network: a number, or auto for the plan
            that `OnlineTrainer` takes.
        pack_spikes: Whether spikes are kept as bits: true, false or auto.
        cache_invariant: Whether to evaluate only once what does not depend on time: true, false or auto.
        memory_budget: The memory for plans that are auto: 6GiB, a part of the device such as 0.8, or least. None takes the
            leanest plan that is about as fast as the fastest.
        mse_weight: Weight lambda of the squared error. The weight of the cross-entropy is 1 - lambda.
        mse_target: The value to which the squared error pulls the output: a number, or one_hot.
        dropout: Probability of dropping a spike; not for NF-ResNets.
        width: Channels of the network's first stage.
        precision: The precision by Lightning's name: 16-mixed, bf16-mixed or 32-true.
        seed: Seed of weights, batches, transforms and drawn steps.
        data_dir: Folder of the data set; the default is the set's own, below ./data.
        output: Folder for logs and checkpoints.
        pretrained: Checkpoint to start from, of another run or of the published code.
        resume: Continue from the run's last checkpoint in the output folder.
        evaluate: Checkpoint to test instead of training, of another run or of the published code.
        devices: How many devices, or CPU processes, to train on.
        accelerator: The accelerator by Lightning's name: auto, cpu or gpu.
        workers: Processes that load data ahead.
        on_corrupt: What to do with a file that cannot be read: raise an error that names it, or skip it.
        smoke: A quick trial: one epoch of a few batches, with a narrow network and a tiny made-up set in the original file
            format.
    """

    data: str
    network: str
    time_steps: int
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    method: Literal["bptt", "sltt", "sltt-k"] = "sltt"
    k: int = 2
    schedule: Literal["random", "stratified", "early"] = "random"
    scale: Literal["mean", "paper"] = "mean"
    chunk: int | Literal["auto"] = "auto"
    pack_spikes: bool | Literal["auto"] = "auto"
    cache_invariant: bool | Literal["auto"] = "auto"
    memory_budget: str | None = None
    mse_weight: float = 0.05
    mse_target: float | Literal["one_hot"] = 1.0
    dropout: float = 0.0
    width: int = 64
    precision: str = "16-mixed"
    seed: int = 2022
    data_dir: Path | None = None
    output: Path = Path("runs")
    pretrained: Path | None = None
    resume: bool = False
    evaluate: Path | None = None
    devices: int = 1
    accelerator: str = "auto"
    workers: int = 4
    on_corrupt: Literal["raise", "skip"] = "raise"
    smoke: bool = False

    @property
    def chosen_method(self) -> Method:
        """The method with its options."""
        name = f"sltt-{self.k}" if self.method == "sltt-k" else self.method
        return replace(
            method_named(name),
            schedule=self.schedule,
            scale=self.scale,
            chunk=UNASKED if self.chunk == "auto" else self.chunk,
            pack_spikes=self.pack_spikes,
            cache_invariant=self.cache_invariant,
            memory_budget=self.memory_budget,
        )

    @property
    def folder(self) -> Path:
        """Where the run's logs and checkpoints are."""
        method = self.chosen_method.name.lower()
        name = f"{self.data}-{self.network}-T{self.time_steps}-{method}" + "-smoke" * self.smoke
        return self.output / name


def from_command_line(description: str, arguments: list[str] | None = None) -> Experiment:
    """The settings on a command line. A wrong setting ends the program with a note on its usage.

    Args:
        description: Description of the script, for ``--help``.
        arguments: The command line; None is the program's own.
    """
    jsonargparse = require("jsonargparse", extra="train")
    parser = jsonargparse.ArgumentParser(
        description=description, formatter_class=jsonargparse.DefaultHelpFormatter
    )
    parser.add_argument("--config", action="config", help="file with any of these settings")
    parser.add_class_arguments(Experiment, skip=set(FLAGS))
    for name, help_text in FLAGS.items():
        parser.add_argument(f"--{name}", action="store_true", help=help_text)
    settings = vars(parser.parse_args(arguments))
    return Experiment(**{name: value for name, value in settings.items() if name != "config"})
