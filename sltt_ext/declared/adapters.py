"""The adapters of declared neurons."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sltt_ext.declared.comparison import ABSENT, compare, compare_states, put_to_rest
from sltt_ext.declared.compiled import run_compiled_steps
from sltt_ext.declared.record import Declaration
from sltt_ext.errors import BackendError, ConfigurationError
from sltt_ext.functional.inputs import plain
from sltt_ext.kernels import check_backend, is_compiled
from sltt_ext.kernels.lif import LIF
from sltt_ext.neuron import SLTTNeuron, constant, is_taken_apart, snapshot, tensors_in
from sltt_ext.twin import copied

__all__ = ["Declared", "DeclaredState", "DeclaredStep"]


class Declared(SLTTNeuron, nn.Module):
    """What all declared neurons share."""

    declarations: ClassVar[dict[type[nn.Module], Declaration]] = {}
    keeps_steps_apart = True

    @classmethod
    def declaration_of(cls, original: type[nn.Module]) -> Declaration:
        """The declaration of a class, or of the closest one that it is derived from."""
        return next(cls.declarations[base] for base in original.__mro__ if base in cls.declarations)

    @property
    def declaration(self) -> Declaration:
        """The neuron's own."""
        return self.declaration_of(self.original)

    @property
    def multi_step(self) -> bool:
        """Whether it takes ``[T, N, ...]``, as the time loop gives sequences; with its time behind the batch it takes no part."""
        return self.declaration.time_dim == 0

    def spikes(self, output: Any) -> tuple[Tensor, None] | None:
        spikes = self.declaration.spikes_in(output)
        return None if spikes is None else (spikes, None)

    def _sltt_is_new(self, *args: Any) -> bool:
        """Whether this is the first call with numbers in it, which a comparison can read."""
        plain = all(
            type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta for tensor in tensors_in(args)
        )
        return "_sltt_compared" not in vars(self) and plain and not torch.compiler.is_compiling()


class DeclaredState(Declared):
    """A neuron whose own forward runs one step, and keeps its state in attributes that were named."""

    def reset_state(self) -> None:
        self._sltt_remember_rest()
        put_to_rest(self, vars(self)["_sltt_rest"])

    def detach_state(self) -> None:
        for name, value in self._sltt_states().items():
            self._sltt_set(name, constant(value))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._sltt_remember_rest()
        self._sltt_compare(args, kwargs)
        states = self._sltt_states()
        self._begin_step(*tensors_in(states))
        for name, value in states.items():
            self._sltt_set(name, self._entering(value))
        entered = snapshot(self._sltt_states())
        output = self._sltt_step(*args, **kwargs)
        self._end_step(self._sltt_states(), entered)
        return output

    def _sltt_compare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the first call, look for state that was not named."""
        if self._sltt_is_new(args, kwargs):
            compare_states(self, self.original, self.declaration, vars(self)["_sltt_rest"], args, kwargs)
            vars(self)["_sltt_compared"] = True

    def _sltt_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def _sltt_states(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.declaration.state if hasattr(self, name)}

    def _sltt_set(self, name: str, value: Any) -> None:
        if value is not getattr(self, name):
            setattr(self, name, value)

    def _sltt_remember_rest(self) -> None:
        """Before the first step, what the state is at rest.

        Raises:
            ConfigurationError: If there is a state of an earlier step already.
        """
        if "_sltt_rest" in vars(self):
            return
        rest = {name: getattr(self, name, ABSENT) for name in self.declaration.state}
        moved = [
            name
            for name, value in rest.items()
            if any(tensor.grad_fn is not None for tensor in tensors_in(value))
        ]
        if moved:
            raise ConfigurationError(
                f"{self.original.__name__} has run before it was converted, and {moved[0]} is not at rest: convert the network "
                "before its first call, or reset it first"
            )
        vars(self)["_sltt_rest"] = {name: copied(value) for name, value in rest.items()}


class DeclaredStep(DeclaredState):
    """A neuron that runs by its declared step, or by the fused operator."""

    @classmethod
    def check_backend(cls, module: nn.Module, backend: str) -> None:
        if Declared.declaration_of(type(module)).as_lif is not None:
            check_backend(backend, LIF)

    def steps_of(self, *args: Any) -> int:
        time_dim = self.declaration.time_dim
        return 1 if time_dim is None else int(args[0].shape[time_dim])

    def tell_steps(self, steps: int | None) -> None:
        super().tell_steps(steps)
        vars(self).pop("_sltt_calls", None)

    def reset_state(self) -> None:
        if self.declaration.time_dim is None:
            super().reset_state()
        vars(self).pop("_sltt_carried", None)

    def detach_state(self) -> None:
        if self.declaration.time_dim is None:
            super().detach_state()
        elif "_sltt_carried" in vars(self):
            vars(self)["_sltt_carried"] = constant(vars(self)["_sltt_carried"])

    def forward(self, x: Tensor) -> Any:
        if self.declaration.time_dim is None:
            return super().forward(x)
        self._sltt_compare((x,), {})
        return self._sltt_sequence(x)

    def _sltt_compare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._sltt_is_new(args):
            compare(self, self.original, self.declaration, *args)
            vars(self)["_sltt_compared"] = True

    def _sltt_step(self, x: Tensor) -> Any:  # type: ignore[override]
        declaration = self.declaration
        states = tuple(getattr(self, name, None) for name in declaration.state)
        if declaration.as_lif is not None:
            output, *left = declaration.run_as_lif(
                self, x, states[0], self.sltt_backend, single_step=True, through_time=self.through_time
            )
        else:
            output, left = self._sltt_steps_of(x, states, None)  # type: ignore[assignment]
        for name, value in zip(declaration.state, left):
            setattr(self, name, value)
        return output

    def _sltt_sequence(self, x: Tensor) -> Any:
        """All steps of ``x``, from rest, or from where the last call has ended if the time loop goes on from there.

        Raises:
            ConfigurationError: If the time loop goes on from step to step, and this is the second call in one.
        """
        declaration, own, steps = self.declaration, vars(self), self.steps_of(x)
        told, goes_on = self.told_steps, self.told_steps == steps
        if told is not None and not goes_on and declaration.time_dim == 1:
            raise ConfigurationError(
                f"{self.original.__name__} takes [N, T, ...], and got shape {list(x.shape)} in a step of {told}: give it [N, 1, ...] "
                "in a network that runs step by step, or use sltt_ext.convert alone"
            )
        if goes_on:
            own["_sltt_calls"] = own.get("_sltt_calls", 0) + 1
            if own["_sltt_calls"] > 1:
                raise ConfigurationError(
                    f"a {self.original.__name__} runs more than once in a step, and starts from rest each time: use "
                    "one module for each place, or convert alone and your own loop over time"
                )
        state = own.get("_sltt_carried") if goes_on else None  # a constant, since the last call has ended
        hold = (lambda state: state) if self.through_time else constant
        self._begin_step(*tensors_in(state))
        if declaration.as_lif is not None:
            entering = None if state is None else hold(state)[0]
            x_seq = x.movedim(declaration.time_dim, 0)  # type: ignore[arg-type]
            output, v = declaration.run_as_lif(
                self, x_seq, entering, self.sltt_backend, single_step=False, through_time=self.through_time
            )
            output, state = output.movedim(0, declaration.time_dim), (v,)  # type: ignore[arg-type]
        else:
            entering = (None,) * declaration.states if state is None else hold(state)
            output, state = self._sltt_steps_of(x, entering, declaration.time_dim)
        self._end_step(state)
        if goes_on:
            own["_sltt_carried"] = state
        return output

    def _sltt_steps_of(
        self, x: Tensor, state: tuple[Any, ...], time_dim: int | None
    ) -> tuple[Any, tuple[Any, ...]]:
        """Output and states of one step, or of all along ``time_dim``, by the declared step: compiled, or as it is."""
        declaration = self.declaration
        if is_compiled(self.sltt_backend, x) and not is_taken_apart():
            if self.through_time:
                raise BackendError(
                    f"backend='inductor' compiles declared steps from constant states, and {self.original.__name__} has "
                    "temporal='call': convert it with backend='auto'"
                )
            return run_compiled_steps(declaration, self, plain(x), state, time_dim)
        if time_dim is None:
            return declaration.run(self, x, state)
        outputs = []
        for one in x.unbind(time_dim):
            output, state = declaration.run(self, one, state if self.through_time else constant(state))
            outputs.append(output)
        return _stacked(outputs, time_dim), state


def _stacked(outputs: list[Any], time_dim: int) -> Any:
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs, dim=time_dim)
    return type(outputs[0])(_stacked(list(each), time_dim) for each in zip(*outputs))
