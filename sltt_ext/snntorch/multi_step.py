"""Whole sequences through a snnTorch network, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_leaves, tree_map

from sltt_ext.errors import ConfigurationError, InputError, SLTTError, warn
from sltt_ext.forwards import Layer, Replacements
from sltt_ext.neuron import SLTTNeuron, StatefulModule
from sltt_ext.snntorch.neurons import StepwiseNeuron
from sltt_ext.step_trial import StepTrial

__all__ = ["MultiStep"]


class MultiStep(StatefulModule, nn.Module):
    """Runs a converted network over ``[T, N, ...]`` in one call, layer by layer.

    Time is folded into the batch: the network's own ``forward`` sees ``[T * N, ...]``, so that every
    stateless layer takes all steps at once, and each neuron unfolds time, Leaky through the fused operator,
    any other one step after the other. Outputs, states and gradients are those of a loop that calls the
    network T times (stateless layers over ``T * N`` may round differently in the last bit, and on the CPU
    convolutions run channels last, which may too). Normalisation that reads batch statistics runs step by step, as in that loop; a
    ``BatchNormTT`` list in the network is a layer whose t-th norm takes step t. Dropout draws other random
    numbers than the loop does.

    The neurons have to keep their state (``init_hidden=True``), and ``forward`` has to treat the samples of
    a batch alike and keep the batch in front (``x.flatten(1)``, not ``x.view(batch_size, -1)``).

    In an `OnlineTrainer`, ``chunk`` is how many steps go through the network in one call.

    Args:
        net: A converted network.

    Raises:
        SLTTError: If ``net`` is not converted.
        ConfigurationError: If ``net`` has stateful modules of another framework.

    Examples:
        >>> import sltt_ext, snntorch, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), snntorch.Leaky(beta=0.9, init_hidden=True))
        >>> multi_step = MultiStep(sltt_ext.convert(net))
        >>> multi_step(torch.rand(25, 8, 4)).shape
        torch.Size([25, 8, 2])
    """

    keeps_steps_apart = True
    _folds: bool | None = None  # not known yet

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        neurons = [module for module in net.modules() if isinstance(module, SLTTNeuron)]
        if not neurons:
            raise SLTTError(f"{type(net).__name__} is not converted: call sltt_ext.convert(net) first")
        others = {type(module).__name__ for module in neurons if not isinstance(module, StepwiseNeuron)}
        if others:
            raise ConfigurationError(
                f"MultiStep runs snnTorch's neurons only, and the network has {', '.join(sorted(others))}: "
                "call it step by step"
            )
        self.fold = _Fold()
        self.net = net

    @property
    def multi_step(self) -> bool:
        return True

    @property
    def whole_sequence(self) -> bool:  # type: ignore[override]
        """A ``BatchNormTT`` list knows the steps of a sequence by their place in the call."""
        return any(map(_is_batch_norm_through_time, self.net.modules()))

    def reset_state(self) -> None:
        """The neurons in the network carry the state, and are reset themselves.

        Before the first sequence, all is as the user has made it, and is copied for a trial.
        """
        if self._folds is None and self not in _TRIALS:
            _TRIALS[self] = self._trial()

    def detach_state(self) -> None:
        """The neurons in the network carry the state, and are detached themselves."""

    def forward(self, x_seq: Any) -> Any:
        """What the network returns for every step of ``x_seq`` ``[T, N, ...]``, each tensor ``[T, N, ...]``.

        ``x_seq`` may be several such tensors in a dict or tuple, which the network takes as one ``[N, ...]`` each.

        Raises:
            InputError: If ``x_seq`` is no sequence, has another number of steps than a ``BatchNormTT`` list,
                or the network returns a tensor that does not have the batch in front.
            ConfigurationError: If a neuron is passed its state, or runs more than once in a step.
            SLTTError: If the network has been reverted.
        """
        if not any(isinstance(module, StepwiseNeuron) for module in self.net.modules()):
            raise SLTTError(
                "the network was reverted, and only converted neurons unfold time: convert it again, or call it step "
                "by step without MultiStep"
            )
        time_steps, _ = _steps_and_batch(x_seq)
        if time_steps > 1 and not self._may_fold(x_seq):
            steps = [self._run(tree_map(lambda x, t=t: x[t : t + 1], x_seq)) for t in range(time_steps)]
            return tree_map(
                lambda first, *rest: torch.cat([first, *rest]) if isinstance(first, Tensor) else first, *steps
            )
        return self._run(x_seq)

    def _run(self, x_seq: Any) -> Any:
        """The steps of ``x_seq``, folded into the batch."""
        time_steps, batch = _steps_and_batch(x_seq)

        def unfolded(output: Any) -> Any:
            if not isinstance(output, Tensor):
                return output
            if output.dim() == 0 or output.shape[0] != time_steps * batch:
                raise InputError(
                    f"the network returned shape {list(output.shape)} for {time_steps} steps of {batch} samples, "
                    f"folded to a batch of {time_steps * batch}: its forward has to keep the batch in front"
                )
            return output.unflatten(0, (time_steps, batch))

        replaced = Replacements()
        replaced.begins_at([self.fold])  # a pass of the time loop begins at the module itself
        with replaced, replaced:  # entered twice, in case of an interrupt
            _Unfolding(time_steps, batch).around(self.net, replaced)
            return tree_map(unfolded, self.net(self.fold(x_seq)))

    def _may_fold(self, x_seq: Any) -> bool:
        """Whether steps that are folded into the batch are those steps; tried on the first sequence."""
        if self._folds is None and not (torch.compiler.is_compiling()):
            trial = _TRIALS.pop(self, None) or self._trial()
            self._folds = True
            if trial is not None and (reason := _against_folding(trial, x_seq)):
                self._folds = False
                warn(
                    f"MultiStep runs the time steps one by one, since {reason}. The result is that of a loop over time; "
                    "call the network without MultiStep to save the folding"
                )
        return self._folds is not False

    def _trial(self) -> StepTrial | None:
        trial = StepTrial.of(self)
        if trial is not None:
            cast(MultiStep, trial.net)._folds = True
        return trial


_TRIALS: WeakKeyDictionary[MultiStep, StepTrial | None] = WeakKeyDictionary()
"""What is to be tried with the first sequence; not kept by the module itself, which may be saved and copied."""


def _against_folding(trial: StepTrial, x_seq: Any) -> str | None:
    """Why steps cannot be folded into the batch; None where nothing speaks against it."""
    time_steps, _ = _steps_and_batch(x_seq)
    if trial.keeps(x_seq, time_steps):
        return (
            "the network keeps something of its own from call to call, which changes what it returns (detach what is kept: "
            "nothing else does so within a call)"
        )
    if (where := trial.mixing(x_seq, time_steps)) is not None:
        return (
            f"the network mixes the samples of a batch, into which time would be folded: {where} at one time step depends on "
            "the input of other steps"
        )
    return None


class _Fold(nn.Module):
    """Time becomes a part of the batch; a module, so that the time loop sees what it makes of an input that is static."""

    sltt_time_invariant = True
    sltt_folds_time = True

    def forward(self, x_seq: Any) -> Any:
        return tree_map(lambda part: part.flatten(0, 1), x_seq)


def _steps_and_batch(x_seq: Any) -> tuple[int, int]:
    """T and N, the same in all parts of an input."""
    parts = tree_leaves(x_seq)
    if not parts or not all(isinstance(part, Tensor) and part.dim() >= 2 and len(part) for part in parts):
        got = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        raise InputError(
            f"x_seq must be [T, N, ...] with T >= 1, or several such tensors, got {', '.join(map(str, got))}"
        )
    sizes = {tuple(part.shape[:2]) for part in parts}
    if len(sizes) > 1:
        raise InputError(
            f"the parts of x_seq must agree in their first two axes, time and batch, got {sorted(sizes)}"
        )
    return sizes.pop()  # type: ignore[return-value]


class _Unfolding:
    """Unfolds time where a layer tells time steps apart.

    Args:
        time_steps: T.
        batch: N, so that what has all steps in it has a multiple of ``T * N`` rows, and one step a multiple of N.
    """

    def __init__(self, time_steps: int, batch: int) -> None:
        self._time_steps = time_steps
        self._batch = batch
        self._in_step = False
        self._seen: set[nn.Module] = set()

    def around(self, net: nn.Module, replaced: Replacements) -> None:
        """Stand around these layers of ``net``."""
        for module in net.modules():
            if isinstance(module, StepwiseNeuron):
                replaced.attribute(module, "sltt_time_steps", self._time_steps)
                if self._time_steps > 1:
                    replaced.forward(module, Layer.STEPS, self._once)
            elif _is_list_of_batch_norms(module):
                replaced.forward(module, Layer.STEPS, self._norm_of_each_step)
            elif isinstance(module, _NormBase) and (module.training or module.running_mean is None):
                replaced.forward(module, Layer.STEPS, self._step_by_step)
            elif type(module) is nn.Conv2d and module.weight.device.type == "cpu" and self._batch > 1:
                # of one sample, torch's instance norm misreads a gradient that is laid out so
                replaced.attribute(module, "_conv_forward", partial(_channels_last, module))

    def _once(self, neuron: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if neuron in self._seen:
            raise ConfigurationError(
                f"a {neuron.original.__name__} runs more than once in a step, and MultiStep would run all steps of the first "
                "time before the second time: use chunk=1, or call the network step by step, without MultiStep"
            )
        self._seen.add(neuron)
        return forward(*args, **kwargs)

    def _step_by_step(self, norm: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self._in_step or len(x) == self._batch != self._time_steps * self._batch:  # the network's own loop
            return forward(x)
        if norm in self._seen and self._time_steps > 1 and norm.training and norm.running_mean is not None:
            warn(
                f"a {type(norm).__name__} runs more than once in a step: MultiStep runs all steps of the first time before the "
                "second time, so that running statistics count them in another order than a loop over time. Give each place "
                "a norm of its own, or use chunk=1"
            )
        self._seen.add(norm)
        return torch.cat([forward(x_t) for x_t in self._steps(norm, x)])

    def _norm_of_each_step(self, norms: Any, forward: Any, x: Tensor) -> Tensor:
        if len(norms) != self._time_steps:
            raise InputError(
                f"a BatchNormTT made for {len(norms)} time steps got a sequence of {self._time_steps}: run all of them "
                "in one call"
            )
        steps = self._steps(norms, x)
        self._in_step = True
        try:
            return torch.cat([norm(x_t) for norm, x_t in zip(norms, steps)])
        finally:
            self._in_step = False

    def _steps(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        if len(x) % (self._time_steps * self._batch):
            raise InputError(
                f"{type(module).__name__} is called with {len(x)} rows, and {self._time_steps} steps of {self._batch} "
                "samples are folded into the batch: it cannot tell the steps apart. Keep the batch in front, or call the "
                "network step by step, without MultiStep"
            )
        return x.split(
            len(x) // self._time_steps
        )  # of one sample, unflatten makes strides that torch's norms misread


def _channels_last(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution that lays its output out channels last: the pooling after it is several times as fast."""
    laid_out = weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # also where there is one channel
    return nn.Conv2d._conv_forward(conv, x, laid_out, bias)


def _is_list_of_batch_norms(module: nn.Module) -> bool:
    return (
        type(module) is nn.ModuleList and len(module) > 0 and all(isinstance(n, _BatchNorm) for n in module)
    )


def _is_batch_norm_through_time(module: nn.Module) -> bool:
    """Whether a module is what snnTorch's BatchNormTT1d and BatchNormTT2d return: a list of norms without bias."""
    if not _is_list_of_batch_norms(module):
        return False
    return all(norm.weight is not None and norm.bias is None for norm in module.children())
