"""SLTT in Lightning: a LightningModule around an `OnlineTrainer`, and a callback that watches the network.

Lightning's ``Trainer`` keeps its job (devices, precision, progress, loggers, checkpoints). Optimisation is
manual, because the time loop runs the T backward passes of an iteration.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import ConfigurationError, InputError, warn
from sltt_ext.methods import GradientTrainer
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.online import OnlineTrainer
from sltt_ext.optional import require

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule
else:
    require("lightning", extra="train")
    from lightning.pytorch import Callback, LightningModule

__all__ = ["NetworkMonitor", "OnlineModule"]


class OnlineModule(LightningModule):
    """A LightningModule whose training step is `OnlineTrainer.forward_backward`.

    Subclass it and override ``configure_optimizers``, with any optimizer and any scheduler, as in any
    LightningModule. Batches are ``(x, target)``; for others, override ``unpack``. It logs ``train_loss``, ``val_loss``
    and, if targets are class indices, ``val_accuracy`` of the output averaged over time.

    Its checkpoints have the states of torch's default random generators of each process. A run that is resumed at the
    end of an epoch continues with the same order of the data, the same steps of SLTT-K and the same dropout.

    Args:
        online: An `OnlineTrainer` or a `BPTTTrainer`. This module sets its ``backward`` and ``wrapper``.
        gradient_clip_val: Clip gradients to this norm or value; None does not clip. (The ``Trainer``'s own options
            ``gradient_clip_val`` and ``accumulate_grad_batches`` are for automatic optimisation.)
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        accumulate_grad_batches: The number of batches for one update, which uses the mean of their gradients.
        lr_monitor: The logged metric that a ``ReduceLROnPlateau`` scheduler reads, such as ``"val_loss"``.

    Raises:
        MissingDependencyError: On import, if Lightning is not installed.
        ConfigurationError: If ``online`` has its own ``backward``, or updates at every step.
    """

    def __init__(
        self,
        online: GradientTrainer,
        *,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        accumulate_grad_batches: int = 1,
        lr_monitor: str | None = None,
    ) -> None:
        super().__init__()
        updates = isinstance(online, OnlineTrainer) and online.on_step is not None
        if online.backward is not None or updates:
            raise ConfigurationError(
                "Lightning does the back-propagation and the updates: make the OnlineTrainer without backward= "
                "and on_step="
            )
        self.automatic_optimization = False
        self.net = online.net
        self.online = online
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.accumulate_grad_batches = accumulate_grad_batches
        self.lr_monitor = lr_monitor
        self._resumed: tuple[int, dict[str, Any]] | None = None  # steps until then, random states
        online.backward = self._scaled_backward

    def forward(self, x: Any) -> Any:
        """The network's output averaged over time."""
        return self.online.predict(x)

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Input and target of a batch of the data loader.

        Raises:
            InputError: If the batch is not a pair. A subclass can override this method for other batches.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            got = f"a {type(batch).__name__}"
            if isinstance(batch, Sized):
                got += f" of {len(batch)}"
            raise InputError(
                f"OnlineModule takes batches (x, target), got {got}: override unpack(self, batch), which returns both"
            )
        x, target = batch
        return x, target

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Accumulate the gradient of one batch, and update if it is time; returns the loss for the learning rate finder."""
        x, target = self.unpack(batch)
        update = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        model = self.trainer.strategy.model
        self.online.wrapper = model if model is not self else None
        result = self.online.forward_backward(x, target, sync=update)
        self.log("train_loss", result.loss, prog_bar=True, batch_size=_batch_size(result.output))
        if update:
            self._update()
        return result.loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip the gradients, which are unscaled by now."""
        self.clip_gradients(optimizer, self.gradient_clip_val or 0.0, self.gradient_clip_algorithm)

    def on_train_epoch_end(self) -> None:
        """Step the schedulers that count epochs."""
        self._step_schedulers("epoch", self.current_epoch + 1)
        resumed, self._resumed = self._resumed, None
        if resumed is not None and resumed[0] == self.global_step:
            # saved between the last batch of an epoch and its end: Lightning has made an iterator but read no batch
            self._set_random_states(resumed[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss of the output averaged over time, and its accuracy."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss of the output averaged over time, and its accuracy."""
        self._evaluate("test", batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the generator of the drawn steps, if there is one, and torch's default generators."""
        if isinstance(self.online, OnlineTrainer):
            checkpoint["sltt_ext"] = self.online.state_dict()
        checkpoint["sltt_ext random"] = self._random_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the drawing of steps, and if training is resumed, all random numbers.

        Warns:
            SLTTWarning: If training is resumed, but the checkpoint has no random numbers for so many processes.
        """
        if isinstance(self.online, OnlineTrainer):
            self.online.load_state_dict(checkpoint["sltt_ext"])
        if self._trainer is None or not self._trainer.training:
            return
        states = checkpoint.get("sltt_ext random")
        if states is None or len(states["cpu"]) != self.trainer.world_size:
            warn(
                "the checkpoint has no random numbers for this run (it is from an earlier version, or from another number "
                "of processes): the order of the data and everything else that is random differ from an uninterrupted run"
            )
            return
        self._resumed = checkpoint["global_step"], states
        self._set_random_states(states)

    def on_train_start(self) -> None:
        """When training is resumed, warn of loaders whose random numbers no checkpoint has.

        Warns:
            SLTTWarning: If a loader has persistent workers or its own generator.
        """
        loaders = _loaders(self.trainer.train_dataloader)
        if self._resumed is not None and any(map(_draws_on_its_own, loaders)):
            warn(
                "a DataLoader has persistent_workers=True, or shuffles with its own generator=: no checkpoint has "
                "its random numbers, so this run differs from an uninterrupted one. Leave both out"
            )

    def _random_states(self) -> dict[str, Any]:
        """The states of torch's default generators in all processes, ``[processes, bytes]`` each."""
        strategy = self.trainer.strategy
        states = {"cpu": torch.get_rng_state()}
        if strategy.root_device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(strategy.root_device)
        gathered = {
            name: strategy.all_gather(state.to(strategy.root_device)) for name, state in states.items()
        }
        return {name: state.reshape(self.trainer.world_size, -1).cpu() for name, state in gathered.items()}

    def _set_random_states(self, states: dict[str, Any]) -> None:
        device = self.trainer.strategy.root_device
        torch.set_rng_state(
            states["cpu"][self.global_rank].clone()
        )  # torch crashes with a row of a larger tensor
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"][self.global_rank].clone(), device)

    def _scaled_backward(self, loss: Tensor) -> None:
        self.manual_backward(loss / self.accumulate_grad_batches)

    def _update(self) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()
            optimizer.zero_grad()
        self._step_schedulers("step", self.global_step)

    def _step_schedulers(self, interval: str, count: int) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval and count % config.frequency == 0:
                self.lr_scheduler_step(config.scheduler, self._metric_for(config.scheduler))

    def _metric_for(self, scheduler: Any) -> Any:
        if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            return None
        metrics = self.trainer.callback_metrics
        if self.lr_monitor not in metrics:
            raise ConfigurationError(
                f"ReduceLROnPlateau needs lr_monitor=, one of {', '.join(sorted(metrics))}; got {self.lr_monitor!r}"
            )
        return metrics[self.lr_monitor]

    def _evaluate(self, stage: str, batch: Any) -> None:
        if getattr(self.online, "target_time_dim", None) is not None:
            name = {"val": "validation_step", "test": "test_step"}[stage]
            raise ConfigurationError(
                f"OnlineModule evaluates the output averaged over time, and with target_time_dim= there is a target for each "
                f"step: override {name}(self, batch, batch_idx)"
            )
        x, target = self.unpack(batch)
        output = self(x)
        size = _batch_size(output)
        self.log(f"{stage}_loss", self.online.loss_fn(output, target), batch_size=size, sync_dist=True)
        classes = isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point()
        if classes and isinstance(output, Tensor):
            accuracy = (output.argmax(1) == target).float().mean()
            self.log(f"{stage}_accuracy", accuracy, prog_bar=True, batch_size=size, sync_dist=True)


def _loaders(loaders: Any) -> Iterator[Any]:
    """The loaders in Lightning's collections."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        for inner in loaders:
            yield from _loaders(inner)
    elif loaders is not None:
        yield loaders


def _draws_on_its_own(loader: Any) -> bool:
    """Whether the order of its samples or the draws of its workers do not come from torch's default generator."""
    order = getattr(getattr(loader, "sampler", None), "generator", None)
    workers_stay = getattr(loader, "persistent_workers", False)
    return order is not None or (workers_stay and loader.generator is None)


def _batch_size(output: Any) -> int:
    return int(tree_leaves(output)[0].shape[0])


class NetworkMonitor(Callback):
    """Logs the firing rate of each neuron layer, the peak memory and the time, every ``every_n_batches`` batches.

    ``firing_rate/LAYER`` is the number of spikes per neuron and time step in that batch. ``peak_memory_mb`` is the most CUDA
    memory allocated since the last log; it is not logged on other devices, which do not count it. ``batch_seconds`` is the
    mean time of a batch since the last log.

    Args:
        every_n_batches: How often to log. The hooks that count spikes are in place only for these batches.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        if every_n_batches < 1:
            raise ConfigurationError(f"every_n_batches must be a positive integer, got {every_n_batches}")
        self.every_n_batches = every_n_batches
        self._hooks: list[Any] = []
        self._rates: dict[str, list[Tensor]] = {}
        self._since = (0, 0.0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count spikes in this batch, if it is time."""
        if batch_idx == 0:
            self._since = (0, time.perf_counter())
        if batch_idx % self.every_n_batches == 0:
            for name, module in pl_module.net.named_modules():
                if issubclass(type(module), SLTTNeuron) and module.fires:
                    self._hooks.append(module.register_forward_hook(self._count(name)))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the counts of this batch, if there are any."""
        if not self._hooks:
            return
        self._remove_hooks()
        for name, rates in self._rates.items():
            pl_module.log(f"firing_rate/{name}", torch.stack(rates).mean(), batch_size=1)
        self._rates.clear()
        first, start = self._since
        pl_module.log("batch_seconds", (time.perf_counter() - start) / (batch_idx + 1 - first), batch_size=1)
        self._since = (batch_idx + 1, time.perf_counter())
        if pl_module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(pl_module.device) / 1e6
            pl_module.log("peak_memory_mb", peak, batch_size=1)
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._remove_hooks()

    def _count(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            spikes = output[0] if isinstance(output, (tuple, list)) else output
            self._rates.setdefault(name, []).append(spikes.detach().float().mean())

        return hook

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
