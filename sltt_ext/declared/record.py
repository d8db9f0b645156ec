"""A declaration, as the adapters read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sltt_ext.errors import ConfigurationError, DeclarationError
from sltt_ext.functional.lif_operator import decay_of, lif_settings, run_lif
from sltt_ext.neuron import tensors_in

__all__ = ["Declaration"]

_LIF = {
    "tau": None,
    "decay_input": False,
    "factored_leak": False,
    "v_threshold": 1.0,
    "v_reset": 0.0,
    "detach_reset": False,
}


@dataclass(frozen=True)
class Declaration:
    """What is known of a class of neurons.

    Attributes:
        cls: The class.
        step: One step, or None.
        time_dim: The axis of time, or None where a call is one step.
        state: The names of its states: attributes, where a call is one step.
        states: How many states the step takes.
        spikes: The output that holds spikes alone.
        as_lif: Its settings as a LIF neuron.
    """

    cls: type[nn.Module]
    step: Callable[..., Any] | None
    time_dim: int | None
    state: tuple[str, ...]
    states: int
    spikes: int | None
    as_lif: Callable[[Any], Mapping[str, Any]] | None

    def spikes_in(self, output: Any) -> Tensor | None:
        """What was said to hold spikes alone."""
        if self.spikes is None:
            return None
        spikes = output[self.spikes] if isinstance(output, (tuple, list)) else output
        return spikes if isinstance(spikes, Tensor) else None

    def run(self, module: nn.Module, x: Tensor, state: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """Output and states of one step by the step function.

        Raises:
            DeclarationError: If the step returns something else.
        """
        assert self.step is not None
        returned = self.step(module, x, *state)
        wanted = f"(output, {', '.join(self.state)})"
        if not isinstance(returned, tuple) or len(returned) != 1 + self.states:
            got = f"{len(returned)} values" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
            raise DeclarationError(
                f"the step of {self.cls.__name__} takes {self.states} states, so it has to return {wanted}, and returned {got}"
            )
        output, *left = returned
        for name, value in zip(self.state, left):
            for tensor in tensors_in(value):
                if tensor.dim() and tensor.shape[0] not in (1, x.shape[0]):
                    raise DeclarationError(
                        f"the step of {self.cls.__name__} left {name} with shape {list(tensor.shape)} for an input "
                        f"{list(x.shape)}: a step is given one time step [N, ...], without the axis of time"
                    )
        return output, tuple(left)

    def run_as_lif(
        self,
        module: nn.Module,
        x_seq: Tensor,
        v: Any,
        backend: str,
        single_step: bool,
        through_time: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Spikes and potential by the fused operator, of a sequence ``[T, N, ...]`` or of one step.

        Raises:
            ConfigurationError: If ``as_lif`` returns something that is no setting.
        """
        assert self.as_lif is not None
        given = dict(self.as_lif(module))
        surrogate, w = given.pop("surrogate", None), given.pop("w", None)
        if surrogate is None or given.keys() - _LIF.keys():
            raise ConfigurationError(
                f"as_lif of {self.cls.__name__} must return surrogate=, an sltt_ext.surrogate.Surrogate, and those of "
                f"{', '.join([*_LIF, 'w'])} that are not the default, got {', '.join(given) or 'nothing'}"
            )
        given = {**_LIF, **given}
        settings = lif_settings(**given, through_time=through_time, surrogate=surrogate)
        decay = None if w is None else decay_of(w, x_seq)
        return run_lif(x_seq, v, decay, settings, backend=backend, single_step=single_step)
