"""Thousands of random cases of one framework: counts, and the least that shows each fault.

python tests/fuzz/run.py --framework spikingjelly --cases 5000 [--seed S] [--shrink 20]

Ends with 1 where a speed-up is wrong.
"""

import argparse
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.check import VERDICTS, Verdict, shrunk, verdict
from fuzz.description import WAYS, Block, Case
from fuzz.generator import random_case


@dataclass
class Fault:
    """Cases that fail for what seems the same reason: they all have what the shrunk one has.

    Attributes:
        seeds: Of the cases.
    """

    case: Case
    found: Verdict
    seeds: list[int]

    def like(self, case: Case, found: Verdict) -> bool:
        return found.like(self.found) and features(self.case) <= features(case)


def features(case: Case) -> set[str]:
    """What a case has that may make a difference."""
    options = case.options
    parts = {
        f"{name}={getattr(options, name)}"
        for name in ("way", "loss", "backward", "loss_on", "on_step", "scale", "inside", "calls")
    }
    parts |= {"counts"} if options.counts else set()
    parts |= {"selects"} if options.select is not None else set()
    parts |= {f"chunk={'auto' if options.chunk == 'auto' else 'several'}"} if options.chunk != 1 else set()
    named = ("cache_invariant", "pack_spikes", "input_gradient", "carry", "lengths", "front", "memory_budget")
    parts |= {name for name in named if getattr(options, name)}
    parts |= {"several steps in a call"} if case.form == "multi" else set()
    plainest = Case(case.framework, 0, ())
    return (parts | _of_blocks(case.blocks)) - (set() if case == plainest else features(plainest))


def _of_blocks(blocks: tuple[Block, ...]) -> set[str]:
    found: set[str] = set()
    for block in blocks:
        found |= {f"{block.kind} {block.variant}", f"hook {block.hook}", f"weight {block.weight}"}
        found |= _of_blocks(block.inner)
    return found


def script(case: Case) -> str:
    """A few lines of Python that run the case."""
    return (
        "from fuzz.check import verdict\nfrom fuzz.description import Block, Case, Options\n\n"
        f"print(verdict({case!r}))"
    )


class Findings:
    """What came out so far.

    Args:
        shrinks: How many faults to shrink at most.
    """

    def __init__(self, shrinks: int):
        self.shrinks = shrinks
        self.counts: Counter[tuple[str, str]] = Counter()
        self.reasons: Counter[str] = Counter()
        self.faults: list[Fault] = []

    def add(self, seed: int, case: Case) -> None:
        found = verdict(case)
        self.counts[case.options.way, found.kind] += 1
        if not found.is_fault:
            self.reasons[f"{found.kind}: {found.reason}"] += bool(found.reason)
            return
        if self._is_known(seed, case, found):
            return
        if len(self.faults) < self.shrinks:
            case = shrunk(case, found)
            if self._is_known(seed, case, found):
                return
        self.faults.append(Fault(case, verdict(case), [seed]))

    def _is_known(self, seed: int, case: Case, found: Verdict) -> bool:
        known = next((fault for fault in self.faults if fault.like(case, found)), None)
        if known is not None:
            known.seeds.append(seed)
        return known is not None

    def report(self, console: Console) -> None:
        lines = [
            f"{way:>9} " + ", ".join(f"{self.counts[way, kind]} {kind}" for kind in VERDICTS) for way in WAYS
        ]
        lines += [f"{number:6d} {reason}" for reason, number in self.reasons.most_common() if number]
        for fault in sorted(self.faults, key=lambda fault: (fault.found.kind, -len(fault.seeds))):
            seeds = ", ".join(map(str, fault.seeds[:5]))
            lines.append(
                f"\n# {fault.found.kind}, {len(fault.seeds)} cases, seeds {seeds}: {fault.found.reason}\n"
                + script(fault.case)
            )
        for line in lines:
            console.print(line, highlight=False, markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=["spikingjelly", "snntorch"], required=True)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--shrink", type=int, default=20, help="how many faults to shrink at most")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=110, soft_wrap=True)
    found = Findings(chosen.shrink)
    seeds = range(chosen.seed, chosen.seed + chosen.cases)
    with suppress(KeyboardInterrupt):  # tells what there is
        for seed in track(seeds, chosen.framework, console=console, transient=True):
            found.add(seed, random_case(chosen.framework, seed))
    found.report(console)
    return 1 if any(found.counts[way, "speed-up fault"] for way in WAYS) else 0


if __name__ == "__main__":
    sys.exit(main())
