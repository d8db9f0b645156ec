"""Where an iteration that goes block by block has its borders: where the user has put them, or where they need least memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import ConfigurationError
from sltt_ext.forwards import has_hooks
from sltt_ext.online.block_costs import (
    batch_size,
    costs,
    least_borders,
    most_parts,
    parts_of_batch,
    peak_bytes,
)
from sltt_ext.online.blockwise import BlockKnowledge, Blockwise
from sltt_ext.online.borders import Samples
from sltt_ext.online.chain import Chain
from sltt_ext.online.compiled import is_compiled
from sltt_ext.online.distributed import is_distributed
from sltt_ext.online.frames import Frames
from sltt_ext.online.grouping import Grouping
from sltt_ext.online.invariant_trials import InvariantModules
from sltt_ext.online.passes import Pass, SpeedUp

__all__ = ["Blocks", "check_options"]


class Blocks:
    """The blocks of one network, from one iteration to the next.

    Args:
        chosen: ``"auto"``, or modules of the network.

    Attributes:
        parts: In how many parts of the steps the gradients at a border are kept, where a call has one step.
        peak_bytes: What an iteration needs at its peak, as far as it can be counted beforehand.

    Raises:
        ConfigurationError: If it is neither.
    """

    def __init__(self, chosen: Literal["auto"] | Sequence[nn.Module]) -> None:
        named = isinstance(chosen, Sequence) and not isinstance(chosen, str) and len(chosen) > 0
        if not (chosen == "auto" or (named and all(isinstance(module, nn.Module) for module in chosen))):
            raise ConfigurationError(
                f"blocks must be None, 'auto' or a list of modules of the network, got {chosen!r}"
            )
        self.parts, self.peak_bytes = 1, 0
        self._chosen = chosen
        self._points: tuple[str, ...] = ()
        self._borders: set[str] = set()
        self._in_parts: list[int] = []
        self._axis = 0
        self._static = False
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
        wrapper: nn.Module | None,
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
            wrapper: What the network is wrapped in.

        Raises:
            ConfigurationError: If the network has no such blocks.
        """
        _check_network(one.net, wrapper)
        chain = Chain(one.net)
        points = tuple(point.name for point in chain.points)
        if points != self._points:
            self._points, self._compared = points, False
            self._choose(chain, one, source, packs)
            self._known = [BlockKnowledge() for _ in range(len(self._borders) + 1)]
        blocks = chain.blocks([point for point in chain.points if point.name in self._borders])
        batch = 1
        if max(self._in_parts) > 1:
            batch = batch_size(source().take(0, min(one.sizes.chunk, one.stop)), self._axis) or 1
        compares, self._compared = not self._compared, True
        return Blockwise(
            blocks=blocks,
            known=self._known,
            one=one,
            source=source,
            wants_input_gradient=any(
                isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(x)
            ),
            samples=[self._samples(number, batch) for number in self._in_parts],
            static=self._static and one.source.static is not None,
            parts=min(self.parts, len(one.selected)) if one.sizes.chunk == 1 else 1,
            compares=compares,
            modules=modules,
            caches=caches,
            packs=packs,
            grouping=grouping,
            tried=tried,
        )

    def state_dict(self) -> dict[str, Any]:
        """What was chosen, as plain values."""
        return {
            "points": list(self._points), "borders": sorted(self._borders), "in parts": list(self._in_parts),
            "axis": self._axis, "static": self._static, "peak": self.peak_bytes,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        self._points, self._borders = tuple(state["points"]), set(state["borders"])
        self._in_parts, self._axis = list(state["in parts"]), state["axis"]
        self._static, self.peak_bytes = state["static"], state["peak"]
        self._known, self._compared = [BlockKnowledge() for _ in range(len(self._borders) + 1)], False

    def _choose(self, chain: Chain, one: Pass, source: Callable[[], Frames], packs: bool) -> None:
        """Choose the borders, and in how many parts of the batch each block runs."""
        given = source()
        frame = given.take(0, min(one.sizes.chunk, one.stop))
        found = costs(chain, one, frame, given.static is not None, packs)
        calls, learned = (-(-steps // one.sizes.chunk) for steps in (one.stop, len(one.selected)))
        most = most_parts(batch_size(frame, int(one.multi_step)))
        if self._chosen == "auto":
            places = least_borders(found, calls, learned, most)
        else:
            places = [chain.nodes.index(node) for node in chain.borders_around(self._chosen, one.net)]  # type: ignore[arg-type]
        self._in_parts = parts_of_batch(found, places, calls, learned, most)
        self.peak_bytes = peak_bytes(found, places, calls, learned, most)
        self._static = bool(places) and found[places[0]].static
        self._borders = {chain.nodes[place].name for place in places}
        self._axis = int(one.multi_step)

    def _samples(self, number: int, batch: int) -> list[Samples | None]:
        """So many parts of a batch, as far as it has as many samples."""
        number = min(number, most_parts(batch))
        if number < 2:
            return [None]
        edges = [batch * i // number for i in range(number + 1)]
        return [Samples(self._axis, start, stop, batch) for start, stop in itertools.pairwise(edges)]


def check_options(loss_on: str, on_step: Any, chunk: Any, in_windows: bool) -> None:
    """See that the options of a trainer go with blocks.

    Raises:
        ConfigurationError: If one does not.
    """
    if on_step is not None:
        reason = "on_step= changes weights between two steps, which run together here"
    elif loss_on != "step":
        reason = f"loss_on={loss_on!r} has one loss for all steps, but blocks= takes the loss of each step"
    elif chunk == "auto":
        reason = "chunk='auto' takes as many steps as fit into memory, but blocks= is for the least memory: give chunk a number"
    elif in_windows:
        reason = "temporal='call' with chunk > 1 needs a multi-step network here"
    else:
        return
    raise ConfigurationError(f"blocks= does not go with this: {reason}")


def _check_network(net: nn.Module, wrapper: nn.Module | None) -> None:
    """See that the parts of a network may be called without it.

    Raises:
        ConfigurationError: If they may not, with the reason.
    """
    if is_distributed(wrapper or net):
        reason = f"a {type(wrapper or net).__name__} has to see the calls of the network"
    elif is_compiled(net):
        reason = "torch.compile runs it or a part of it"
    elif has_hooks(net):
        reason = "it has hooks of its own, which would see no call (put them on modules in it)"
    else:
        return
    raise ConfigurationError(
        f"blocks= runs the parts of the network without calling it itself, and {reason}: leave blocks= out"
    )
