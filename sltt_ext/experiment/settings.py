"""The settings of a run: a configuration file, one for each row of the paper's tables, and the command line."""

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
        epochs: How often the training set is gone through.
        batch_size: Samples of a batch; of each process, where there are several.
        learning_rate: Of SGD with momentum 0.9; falls to zero over the epochs along a cosine.
        weight_decay: Of SGD.
        method: bptt, sltt, or sltt-k.
        k: How many of the T steps sltt-k back-propagates.
        schedule: How sltt-k draws them: random, stratified (one of each k-th of the T), or early (late ones less often).
        scale: What divides the sum of the losses of sltt-k: their number (mean), or T (paper).
        chunk: How many steps that sltt and sltt-k back-propagate share a call of the network: a number, or auto for the plan
            that `OnlineTrainer` takes.
        pack_spikes: Whether spikes are kept as bits, true, false or auto.
        cache_invariant: Whether what does not depend on time is evaluated once, true, false or auto.
        memory_budget: For what is auto, such as 6GiB, 0.8 of the device, or least; none is the leanest plan that is about as
            fast as the fastest.
        mse_weight: Weight lambda of the squared error; the cross-entropy's is 1 - lambda.
        mse_target: What the squared error pulls the output to: a number, or one_hot.
        dropout: Probability of dropping a spike; not for NF-ResNets.
        width: Channels of the network's first stage.
        precision: Lightning's name of it: 16-mixed, bf16-mixed or 32-true.
        seed: Of weights, batches, transforms and drawn steps.
        data_dir: Folder of the data set; none is the set's own default, below ./data.
        output: Folder for logs and checkpoints.
        pretrained: Checkpoint to start from: of another run, or of the published code.
        resume: Go on from the run's last checkpoint in the output folder.
        evaluate: Checkpoint to test, in place of training: of another run, or of the published code.
        devices: How many devices, or CPU processes, to train on.
        accelerator: Lightning's name of it: auto, cpu or gpu.
        workers: Processes that load data ahead.
        on_corrupt: What to do about a file that cannot be read: raise an error that names it, or skip it.
        smoke: One epoch, of a few batches, of a narrow network on a tiny made-up set in the original file format.
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
    """The settings on a command line; a wrong one ends the program with a word about its usage.

    Args:
        description: Of the script, for ``--help``.
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
