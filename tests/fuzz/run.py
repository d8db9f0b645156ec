"""Thousands of random cases of one framework: counts, and the least that shows each fault.

python tests/fuzz/run.py --framework spikingjelly --cases 5000 [--seed S] [--shrink 20]

Ends with 1 where a speed-up is wrong.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.check import VERDICTS, Verdict, shrunk, verdict
from fuzz.description import Block, Case
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
        return found.kind == self.found.kind and features(self.case) <= features(case)


def features(case: Case) -> set[str]:
    """What a case has that may make a difference."""
    options = case.options
    parts = {
        f"{name}={getattr(options, name)}" for name in ("loss", "backward", "loss_on", "on_step", "scale")
    }
    parts |= {"selects"} if options.select is not None else set()
    parts |= {f"chunk={'auto' if options.chunk == 'auto' else 'several'}"} if options.chunk != 1 else set()
    parts |= {name for name in ("cache_invariant", "pack_spikes", "input_gradient") if getattr(options, name)}
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=["spikingjelly", "snntorch"], required=True)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--shrink", type=int, default=20, help="how many faults to shrink at most")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=110, soft_wrap=True)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    faults: list[Fault] = []
    seeds = range(chosen.seed, chosen.seed + chosen.cases)
    for seed in track(seeds, f"{chosen.framework}", console=console, transient=True):
        case = random_case(chosen.framework, seed)
        found = verdict(case)
        counts[found.kind] += 1
        if not found.is_fault:
            reasons[f"{found.kind}: {found.reason}"] += bool(found.reason)
            continue
        known = next((fault for fault in faults if fault.like(case, found)), None)
        if known is not None:
            known.seeds.append(seed)
            continue
        small = shrunk(case, found.kind) if len(faults) < chosen.shrink else case
        same = next((fault for fault in faults if fault.like(small, found)), None)
        if same is None:
            faults.append(Fault(small, verdict(small), [seed]))
        else:
            same.seeds.append(seed)
    _report(console, counts, reasons, faults)
    return 1 if counts["speed-up fault"] else 0


def _report(console: Console, counts: Counter[str], reasons: Counter[str], faults: list[Fault]) -> None:
    for kind in VERDICTS:
        console.print(f"{counts[kind]:6d} {kind}", highlight=False)
    for reason, number in reasons.most_common():
        if number:
            console.print(f"{number:6d} {reason}", highlight=False, markup=False)
    for fault in sorted(faults, key=lambda fault: (fault.found.kind, -len(fault.seeds))):
        console.print(
            f"\n# {fault.found.kind}, {len(fault.seeds)} cases, seeds {fault.seeds[:5]}: {fault.found.reason}",
            highlight=False,
            markup=False,
        )
        console.print(script(fault.case), highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
