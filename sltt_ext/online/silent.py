"""A warning, once, after the first iterations, about layers that never fire.

Behind a layer without spikes, the weights get no gradient, and only the biases learn. The network trains without an error and
learns nothing. So the first iterations note which layers have fired. From the second iteration on, layers that have fired are
left alone, and after the tenth all are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import SilentLayersWarning, listed, warn
from sltt_ext.forwards import Layer
from sltt_ext.neuron import SLTTNeuron, tensors_in
from sltt_ext.online.capture import capturing
from sltt_ext.online.compiled import eager_modules
from sltt_ext.online.passes import Call, Pass, SpeedUp

__all__ = ["Silence", "SilentLayers"]

ITERATIONS = 10  # before silence is said
STEPS_OF_A_STREAM = 100  # before it is said where the state is kept from call to call
READ_OUT = 100.0  # a threshold that is not meant to be reached

_Edge = tuple[Any, int]  # of a graph: a node, and which of its outputs


class Silence:
    """What the first iterations have shown of the layers of a network.

    Attributes:
        is_over: Whether there is nothing more to watch.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._iterations = 0
        self._steps = 0
        self._silent: set[str] | None = None  # after the first iteration; None: nobody knows
        self._fired: dict[tuple[str, torch.device], Tensor] = {}
        self._read_out: set[str] = set()
        self._spikes: dict[_Edge, str] = {}  # of the call that runs
        self._potentials: dict[_Edge, str] = {}

    def watches(self, path: str) -> bool:
        """Whether a layer has not fired yet, as far as is known."""
        return self._silent is None or path in self._silent

    def note(self, path: str, neuron: SLTTNeuron, output: Any) -> None:
        """Note whether a layer has fired.

        Args:
            path: Its path.
            neuron: The layer.
            output: What it returned, its spikes first.
        """
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not tensors:
            return
        spikes, *potentials = tensors
        if type(spikes) is not Tensor or spikes.is_meta:  # there are no numbers in it
            self.is_over = True
            return
        fired, before = spikes.detach().any(), self._fired.get((path, spikes.device))
        self._fired[path, spikes.device] = fired if before is None else before | fired
        if self._silent is None and spikes.grad_fn is not None:
            self._spikes[spikes.grad_fn, spikes.output_nr] = path
            for tensor in (*potentials, *tensors_in(neuron.carried())):
                if tensor.grad_fn is not None:
                    self._potentials[tensor.grad_fn, tensor.output_nr] = path

    def read(self, outputs: Any) -> None:
        """Note the layers of a call whose potential is in its outputs, other than by their spikes: these need not fire."""
        waiting = [
            (leaf.grad_fn, leaf.output_nr)
            for leaf in tree_leaves(outputs)
            if self._potentials and isinstance(leaf, Tensor)
        ]
        seen: set[_Edge] = set()
        while waiting:
            edge = node, _ = waiting.pop()
            if node is None or edge in seen or edge in self._spikes:
                continue
            seen.add(edge)
            if edge in self._potentials:
                self._read_out.add(self._potentials[edge])
                continue
            waiting += node.next_functions
        self.end_of_call()

    def end_of_call(self) -> None:
        """Let go of the graph."""
        self._spikes.clear()
        self._potentials.clear()

    def end_of_iteration(self, one: Pass, layers: dict[str, SLTTNeuron]) -> None:
        """Read what was noted, after the first iteration and after the last one that is watched.

        Args:
            one: The pass that is over.
            layers: The network's, by path.
        """
        self._iterations += 1
        self._steps += one.stop
        last = self._iterations >= ITERATIONS and (one.from_rest or self._steps >= STEPS_OF_A_STREAM)
        if self.is_over or not (last or self._silent is None):
            return
        fired = {path for (path, _), fired in self._fired.items() if bool(fired)}
        self._silent = {path for path, _ in self._fired} - fired
        self.is_over = last or not self._silent
        if last:
            self._fired.clear()
            self._say({path: layers[path] for path in layers if path in self._silent})

    def _say(self, silent: dict[str, SLTTNeuron]) -> None:
        found = {
            path: f"a {neuron.original.__name__}"
            for path, neuron in silent.items()
            if path not in self._read_out and not _is_read_out(neuron)
        }
        if found:
            message = (
                f"no neuron of these layers has fired in the first {self._iterations} iterations. Behind a silent layer only the biases "
                "learn, not the weights. A smaller threshold, a batch norm in front of the neurons, a larger input or larger "
                "initial weights make neurons fire; begin with the first of these layers. If the silence is intended: "
                "warnings.simplefilter('ignore', sltt_ext.errors.SilentLayersWarning)"
            )
            warn(listed(message, found), SilentLayersWarning)


class SilentLayers(SpeedUp):
    """Has the layers watched in the first iterations.

    Args:
        silence: What earlier iterations have shown.
    """

    def __init__(self, silence: Silence) -> None:
        self._silence = silence
        self._paths: dict[nn.Module, str] = {}

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Stand next to the forward of the layers, inside of all hooks, if the pass has a gradient."""
        learns = (one.learns or one.differentiable) and not one.again
        if self._silence.is_over or not learns or capturing():
            yield
            return
        eager = set(eager_modules(one.net))
        layers = {
            path: module for path, module in one.net.named_modules() if module in eager and _is_layer(module)
        }
        self._paths = {module: path for path, module in layers.items()}
        for path, module in layers.items():
            if self._silence.watches(path):
                one.replaced.forward(module, Layer.OWN, self._fire)
        yield
        self._silence.end_of_iteration(one, layers)

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Forget the call, whatever ends it."""
        try:
            yield
        finally:
            self._silence.end_of_call()

    def _fire(self, neuron: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        self._silence.note(self._paths[neuron], neuron, output)
        return output


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is neurons, and not something around neurons."""
    inner = (child for child in module.modules() if child is not module)
    return _fires(module) and not any(map(_fires, inner))


def _fires(module: nn.Module) -> bool:
    return isinstance(module, SLTTNeuron) and module.fires


def _is_read_out(neuron: Any) -> bool:
    """Whether neurons are there for their potential: they are not meant to fire, or firing changes nothing in them."""
    if getattr(neuron, "reset_mechanism", None) == "none":
        return True
    for name in ("v_threshold", "threshold"):
        threshold = getattr(neuron, name, None)
        if isinstance(threshold, Tensor):
            threshold = float(threshold.detach().min()) if threshold.numel() else None
        if isinstance(threshold, (int, float)):
            return math.isinf(threshold) or threshold >= READ_OUT
    return False
