"""The library against the oracle: what a case comes to, and what is the least that still shows a fault."""

import gc
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from fuzz import library, reference
from fuzz.description import Case, simpler
from fuzz.training import KEPT_ALIVE, Iteration
from torch import Tensor

from sltt_ext.errors import SLTTError

VERDICTS = ("right", "said", "discarded", "plain fault", "speed-up fault")
_DTYPES = {"spikingjelly": torch.float64, "snntorch": torch.float32}  # snnTorch mixes precisions in float64
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3}
_ROUNDING = {torch.float64: 1e-12, torch.float32: 3e-6}


@dataclass(frozen=True)
class Verdict:
    """What a case comes to.

    Attributes:
        kind: One of `VERDICTS`. A fault is "plain" where it is there without any speed-up, too.
        reason: What differs and by how much, what was said, or why the case was discarded.
        symptom: Whether wrong values, memory or an error show the fault, so that shrinking keeps to one fault.
    """

    kind: str
    reason: str = ""
    symptom: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind.endswith("fault")

    def like(self, other: "Verdict") -> bool:
        return (self.kind, self.symptom) == (other.kind, other.symptom)


def verdict(case: Case) -> Verdict:
    """Run the library and the oracle, and compare all that a user can see."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(_DTYPES[case.framework])
    gc.disable()  # what lives on only until it comes shows
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _compared(case)
            if found.kind != "speed-up fault":
                return found
            plain = _compared(case.without_speed_ups(), fresh=True)
            return replace(found, kind="plain fault") if plain.is_fault else found
    finally:
        gc.enable()
        torch.set_default_dtype(before)


def shrunk(case: Case, fault: Verdict, tries: int = 200) -> Case:
    """The simplest case found, one thing after the other, that comes to a verdict like ``fault``."""
    found = True
    while found and tries > 0:
        found, i = False, 0
        while tries > 0 and i < len(candidates := list(simpler(case))):
            tries -= 1
            if _is_like(candidates[i], fault):
                case, found = candidates[i], True
            else:
                i += 1
    return case


def _is_like(case: Case, fault: Verdict) -> bool:
    try:
        return verdict(case).like(fault)
    except (TypeError, IndexError, ValueError):  # options that do not fit each other any more
        return False


def _compared(case: Case, fresh: bool = False) -> Verdict:
    run = library.run(case, fresh)
    try:
        expected = list(reference.run(case, run.steps))
    except Exception as error:  # whatever it is, the network cannot be trained so by anyone
        return _without_reference(case, run, error)
    values = [value for iteration in expected for value in iteration.values.values() if value is not None]
    if not all(torch.isfinite(value).all() for value in values):
        return Verdict("discarded", "not finite")
    if run.error is not None:
        said = isinstance(run.error, SLTTError)
        reason = f"{type(run.error).__name__}: {str(run.error).splitlines()[0][:160]}"
        return Verdict("said" if said else "speed-up fault", reason, type(run.error).__name__)
    select, time_steps, window = case.options.select, case.options.time_steps, case.options.window
    drawn = [{(t // time_steps, t % time_steps // window) for t in steps} for steps in run.steps]
    if isinstance(select, int) and any(len(one) != select * case.options.calls for one in drawn):
        return Verdict("speed-up fault", f"{run.steps} are not {select} steps or windows each")
    tolerance = _TOLERANCES[torch.get_default_dtype()]
    for iteration, (ours, theirs) in enumerate(zip(run.iterations, expected, strict=True)):
        wrong = differences(ours, theirs, tolerance)
        if wrong:
            return _judged(case, run, theirs, iteration, wrong)
    return Verdict("right")


def _judged(
    case: Case, run: library.Run, theirs: Iteration, iteration: int, wrong: dict[str, float]
) -> Verdict:
    """What a difference comes to."""
    if _is_decided_by_rounding(case, run.steps[: iteration + 1], theirs, wrong):
        return Verdict("discarded", "rounding decides")
    if run.warned:
        return Verdict("said", run.warned[0])
    named = ", ".join(f"{name} by {error:.1e}" for name, error in list(wrong.items())[:6])
    symptom = KEPT_ALIVE if [*wrong] == [KEPT_ALIVE] else "values"
    return Verdict("speed-up fault", f"iteration {iteration}: {named}", symptom)


def _without_reference(case: Case, run: library.Run, error: Exception) -> Verdict:
    """Where plain autograd refuses, the library has to refuse as well."""
    refused = f"{type(error).__name__}: {str(error)[:100]}"
    hidden = (
        "modified by an inplace operation" in str(error) and run.error is None and case.options.pack_spikes
    )
    if hidden:
        unpacked = replace(case, options=replace(case.options, pack_spikes=False))
        if library.run(unpacked, False).error is not None:
            return Verdict("speed-up fault", f"hides what autograd says: {refused}", "hidden")
    return Verdict("discarded", refused)


def differences(ours: Iteration, theirs: Iteration, tolerance: float) -> dict[str, float]:
    """What differs, by how much of its size; of a gradient, of no less than a tenth of the largest gradient."""
    gradients = [v for name, v in theirs.values.items() if name.startswith("gradient") and v is not None]
    largest = max([gradient.norm().item() for gradient in gradients], default=0.0)
    found = {}
    for name in [*theirs.values, *(ours.values.keys() - theirs.values.keys())]:
        floor = 0.1 * largest if name.startswith("gradient") else 1e-3
        error = _error(ours.values.get(name), theirs.values.get(name), floor)
        if error > tolerance:
            found[name] = error
    return found


def _error(ours: Tensor | None, theirs: Tensor | None, floor: float) -> float:
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else float("inf")
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    difference = (ours.double() - theirs.double()).norm().item()
    error = difference / max(theirs.double().norm().item(), floor, 1e-30)
    return float("inf") if math.isnan(error) else error


def _is_decided_by_rounding(
    case: Case, steps: Sequence[tuple[int, ...]], theirs: Iteration, wrong: dict[str, float]
) -> bool:
    """Whether weights that differ in the last digits (and so other spikes) make about as much of a difference."""
    by_rounding: dict[str, float] = {}
    for times in (1, -1, 3, -3, 10):
        noise = times * _ROUNDING[torch.get_default_dtype()]
        other = differences(list(reference.run(case, steps, noise))[-1], theirs, 0.0)
        by_rounding |= {name: max(error, by_rounding.get(name, 0.0)) for name, error in other.items()}
    return all(by_rounding.get(name, 0.0) > 0.2 * error for name, error in wrong.items())
