"""Where an iteration that goes block by block has its borders: what the user has named, or where the least memory is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import ConfigurationError
from sltt_ext.online.blockwise import BlockKnowledge, Blockwise
from sltt_ext.online.chain import Chain
from sltt_ext.online.compiled import is_compiled
from sltt_ext.online.distributed import is_distributed
from sltt_ext.online.frames import Frames
from sltt_ext.online.grouping import Grouping
from sltt_ext.online.invariant_trials import InvariantModules
from sltt_ext.online.passes import CallSizes, Pass, SpeedUp

__all__ = ["Blocks"]


class Blocks:
    """The blocks of one network, from one iteration to the next.

    Args:
        chosen: ``"auto"``, or modules of the network.

    Raises:
        ConfigurationError: If it is neither.
    """

    def __init__(self, chosen: Literal["auto"] | Sequence[nn.Module]) -> None:
        named = isinstance(chosen, Sequence) and not isinstance(chosen, str) and len(chosen) > 0
        if not (chosen == "auto" or (named and all(isinstance(module, nn.Module) for module in chosen))):
            raise ConfigurationError(f"blocks must be None, 'auto' or a list of modules of the network, got {chosen!r}")
        self._chosen = chosen
        self._names: tuple[str, ...] | None = None
        self._known: list[BlockKnowledge] = []
        self._compared = False

    def plan(
        self,
        one: Pass,
        x: Any,
        source: Callable[[], Frames],
        *,
        modules: InvariantModules,
        caches: bool,
        packs: bool,
        grouping: Grouping,
        tried: SpeedUp,
    ) -> Blockwise:
        """How the iteration runs.

        Args:
            one: The pass through the whole network that it stands for.
            x: The input.
            source: Makes the input over time.
            modules: What is known of time-invariant modules.
            caches: Whether they are evaluated once.
            packs: Whether spikes are saved as bits.
            grouping: Who is told that steps may not share a call.
            tried: A trial of the whole network in its first call.

        Raises:
            ConfigurationError: If the network has no such blocks.
        """
        chain = Chain(one.net)
        if self._chosen == "auto":
            borders = chain.points
        else:
            borders = chain.borders_around(self._chosen, one.net)  # type: ignore[arg-type]
        blocks = chain.blocks(borders)
        names = tuple(border.name for border in borders)
        if names != self._names:
            self._names, self._compared = names, False
            self._known = [BlockKnowledge() for _ in blocks]
        compares, self._compared = not self._compared, True
        return Blockwise(
            blocks=blocks,
            known=self._known,
            one=one,
            source=source,
            wants_input_gradient=any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(x)),
            parts=1,
            compares=compares,
            modules=modules,
            caches=caches,
            packs=packs,
            grouping=grouping,
            tried=tried,
        )


def check_network(net: nn.Module, wrapper: nn.Module | None) -> None:
    """See that the parts of a network may be called without it.

    Raises:
        ConfigurationError: If they may not, with the reason.
    """
    if is_distributed(wrapper or net):
        reason = f"a {type(wrapper or net).__name__} sees the calls of the network"
    elif is_compiled(net):
        reason = "torch.compile runs it or a part of it"
    elif net._forward_hooks or net._forward_pre_hooks or net._backward_hooks or net._backward_pre_hooks:
        reason = "it has hooks of its own, which would see no call (put them on modules in it)"
    else:
        return
    raise ConfigurationError(f"blocks= runs the parts of the network without calling it itself, and {reason}: leave blocks= out")
