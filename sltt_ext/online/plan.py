"""The plan of an iteration: how its steps run, what is kept of them, and what is evaluated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Plan", "Way", "size_of"]


class Way(NamedTuple):
    """How an iteration may be run.

    Attributes:
        chunk: Steps that are back-propagated in one call, at most.
        sequences: Whether the network takes sequences, its own way or as one of single steps that is run so.
        packs: Whether spikes are kept as bits.
        caches: Whether what does not depend on time is evaluated once.
        blocks: Whether the network is run block by block, all steps of one and then the next.
    """

    chunk: int
    sequences: bool
    packs: bool
    caches: bool
    blocks: bool = False


@dataclass(frozen=True)
class Plan:
    """What an `OnlineTrainer` does in its iterations. ``str(plan)`` says it in one line.

    Attributes:
        time_steps: T.
        chunk: The most back-propagated steps that share a call.
        group: The most steps without back-propagation that share a call.
        in_sequences: Whether a network of single steps is run on sequences.
        pack_spikes: Whether spikes are kept for backward as bits.
        cache_invariant: Whether what does not depend on time is evaluated once.
        modules_once: The number of modules that are evaluated once.
        peak_bytes: The most bytes in use at the same time (activations, states, gradients); None if nothing was counted.
        budget_bytes: The bytes that the ``memory_budget`` allows; None if there is none.
        seconds: The time of an iteration, the least of a few; None if nothing was timed.
        measuring: What is measured next; "" if the plan is decided.
        blocks: The number of blocks that run one after the other, with all steps of each; 1 if the network runs as a whole.
        whole: Why the network runs as a whole, if ``memory_budget="least"`` has tried blocks; "" if there is no reason.
    """

    time_steps: int
    chunk: int
    group: int
    in_sequences: bool
    pack_spikes: bool
    cache_invariant: bool
    modules_once: int
    peak_bytes: int | None = None
    budget_bytes: int | None = None
    seconds: float | None = None
    measuring: str = ""
    blocks: int = 1
    whole: str = ""

    @property
    def is_decided(self) -> bool:
        """Whether all measurements are done."""
        return not self.measuring

    @property
    def how(self) -> str:
        """How an iteration is run, in words."""
        parts = [f"chunk {self.chunk} of {self.time_steps}"]
        if self.group > self.chunk:
            parts.append(f"{self.group} without gradients")
        if self.in_sequences:
            parts.append("run on sequences")
        if self.blocks > 1:
            parts.append(f"block by block ({self.blocks})")
        if self.pack_spikes:
            parts.append("spikes as bits")
        if self.cache_invariant and self.modules_once:
            parts.append(f"{self.modules_once} module{'s' * (self.modules_once > 1)} once")
        return ", ".join(parts)

    def __str__(self) -> str:
        text = self.how
        if self.peak_bytes is not None:
            of = "" if self.budget_bytes is None else f" of {size_of(self.budget_bytes)}"
            text += f"; {size_of(self.peak_bytes)}{of}"
        if self.whole:
            text += f"; as a whole: {self.whole}"
        return f"{text}; still measuring: {self.measuring}" if self.measuring else text


def size_of(number: int) -> str:
    """Bytes as text, in the largest unit in which the number is at least 1.

    Examples:
        >>> size_of(2040109466), size_of(300)
        ('1.9 GiB', '300 bytes')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.1f} {unit}"
    return f"{number} bytes"
