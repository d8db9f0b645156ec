"""Blocks that nobody has asked for: they are tried once the memory of whole calls is known, and taken if they need less.

If a network runs block by block, hooks see more calls than in calls of the network, with other parts of the data. So a
network with hooks runs as a whole. So does a network that cannot be traced, and one whose output differs block by block (it
may decide by the step that it is in). A network that draws random numbers runs as a whole, too, as its outputs cannot be
compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import one_line
from sltt_ext.forwards import Replacements, has_global_hooks, has_hooks
from sltt_ext.online.block_plan import Blocks
from sltt_ext.online.blockwise import Blockwise
from sltt_ext.online.gradient_hooks import has_gradient_hooks
from sltt_ext.online.grouping import CallBytes
from sltt_ext.online.memory import ActivationMeter
from sltt_ext.online.planner import Iteration, Planner
from sltt_ext.online.snapshot import Snapshot, drawn

__all__ = ["LeanBlocks", "Results"]

Results = tuple[Tensor | None, Any]
"""The sum of the losses, and the mean output."""

_TOLERANCE = 1e-2
"""Of the output's norm: a part of a batch may be rounded in another way, and a spike be another one."""


class _RunsAsAWholeError(Exception):
    """What speaks against blocks, which nobody has asked for."""


class LeanBlocks:
    """The blocks of one trainer, from one iteration to the next.

    Args:
        planner: Who tries them, and is told what speaks against them.
    """

    def __init__(self, planner: Planner) -> None:
        self.blocks = Blocks("auto")
        self._planner = planner

    def run(
        self,
        net: nn.Module,
        iteration: Iteration,
        plan: Callable[[Blocks], Blockwise],
        run: Callable[[Blockwise], Results],
        whole: Callable[[], Any],
        undone: Callable[[], Replacements],
    ) -> Results | None:
        """What an iteration gives that goes block by block; None where something speaks against it, and it is to run as a whole.

        Args:
            net: The network.
            iteration: How the iteration is run.
            plan: Finds the blocks.
            run: Goes through them.
            whole: The mean output of the network as a whole, without gradients.
            undone: A block, to be entered twice, that puts gradients and states back if it is cut short.
        """
        try:
            _look_for_hooks(net)
            planned = plan(self.blocks)
            if iteration.trial is not None:
                return self._tried(net, iteration, planned, run, whole, undone)
        except Exception as error:  # if it is the user's own, the network as a whole raises it, too
            self._planner.keep_whole(
                str(error) if isinstance(error, _RunsAsAWholeError) else one_line(error, 200)
            )
            iteration.run_whole()
            return None
        return run(planned)

    def _tried(
        self,
        net: nn.Module,
        iteration: Iteration,
        planned: Blockwise,
        run: Callable[[Blockwise], Results],
        whole: Callable[[], Any],
        undone: Callable[[], Replacements],
    ) -> Results:
        """The first iterations: whether they need less memory is seen, and whether they give the same."""
        if not self._planner.needs_less(self.blocks.peak_bytes):
            raise _RunsAsAWholeError("it needs more memory block by block")
        before, block, meter = Snapshot(net), undone(), ActivationMeter()
        try:
            expected = _output(net, whole)
            before.restore()
            with block, block, meter:
                found = run(planned)
                _compare(found[1], expected)
        except Exception:
            before.restore()
            raise
        iteration.bytes = [CallBytes(True, iteration.sizes.part, meter.peak_bytes, meter.peak_bytes)]
        self._planner.blocks = len(planned.blocks)
        return found


def _look_for_hooks(net: nn.Module) -> None:
    """See that nobody sees how often modules run.

    Raises:
        _RunsAsAWholeError: If somebody does.
    """
    if has_global_hooks() or has_gradient_hooks(net) or any(map(has_hooks, net.modules())):
        raise _RunsAsAWholeError("it has hooks, which would run more often")


def _output(net: nn.Module, whole: Callable[[], Any]) -> Any:
    """What the network gives as a whole.

    Raises:
        _RunsAsAWholeError: If it draws random numbers.
    """
    before = drawn(net)
    output = whole()
    if drawn(net) != before:
        raise _RunsAsAWholeError("it draws random numbers, which differ block by block")
    return output


def _compare(found: Any, expected: Any) -> None:
    """See that blocks give what the network gives as a whole.

    Raises:
        _RunsAsAWholeError: If they do not.
    """
    for mine, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(mine, FakeTensor):
            continue
        if not float((mine - theirs).norm()) <= _TOLERANCE * float(theirs.norm()):
            raise _RunsAsAWholeError("it gives another output block by block")
