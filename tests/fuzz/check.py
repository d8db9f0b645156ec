"""The library against the oracle: what a case comes to, and what is the least that still shows a fault."""

import gc
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fuzz import networks_snntorch, reference
from fuzz.description import Case, simpler
from fuzz.hooks import everywhere
from fuzz.networks import Net, WithState
from fuzz.training import (
    KEPT_ALIVE,
    Head,
    Iteration,
    LossFn,
    backward,
    batch,
    loss_fn,
    observed,
    optimizer,
    output_of,
)
from torch import Tensor, nn

import sltt_ext
from sltt_ext.errors import SLTTError, SLTTWarning
from sltt_ext.snntorch import MultiStep, Stateful

VERDICTS = ("right", "said", "discarded", "plain fault", "speed-up fault")
_DTYPES = {"spikingjelly": torch.float64, "snntorch": torch.float32}  # snnTorch mixes precisions in float64
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3}
_EXCUSES_NOTHING = (  # the values are right all the same
    "tensors are kept from step to step as plain attributes",
    "chunk=",  # that does not divide T
)
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


@dataclass(frozen=True)
class _Run:
    """What the library made of a case.

    Attributes:
        steps: Those that each iteration back-propagated.
        error: What ended it early.
        warned: What it said of it in warnings.
    """

    iterations: list[Iteration]
    steps: list[tuple[int, ...]]
    error: Exception | None
    warned: list[str]


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
            plain = _compared(case.without_speed_ups(), fresh_trainers=True)
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


def _compared(case: Case, fresh_trainers: bool = False) -> Verdict:
    run = _library(case, fresh_trainers)
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
    drawn = [{t // case.options.window for t in steps} for steps in run.steps]
    if isinstance(case.options.select, int) and any(len(one) != case.options.select for one in drawn):
        return Verdict("speed-up fault", f"{run.steps} are not {case.options.select} steps or windows each")
    tolerance = _TOLERANCES[torch.get_default_dtype()]
    for iteration, (ours, theirs) in enumerate(zip(run.iterations, expected, strict=True)):
        wrong = differences(ours, theirs, tolerance)
        if wrong:
            return _judged(case, run, theirs, iteration, wrong)
    return Verdict("right")


def _judged(case: Case, run: _Run, theirs: Iteration, iteration: int, wrong: dict[str, float]) -> Verdict:
    """What a difference comes to."""
    if _is_decided_by_rounding(case, run.steps[: iteration + 1], theirs, wrong):
        return Verdict("discarded", "rounding decides")
    if run.warned:
        return Verdict("said", run.warned[0])
    named = ", ".join(f"{name} by {error:.1e}" for name, error in list(wrong.items())[:6])
    symptom = KEPT_ALIVE if [*wrong] == [KEPT_ALIVE] else "values"
    return Verdict("speed-up fault", f"iteration {iteration}: {named}", symptom)


def _without_reference(case: Case, run: _Run, error: Exception) -> Verdict:
    """Where plain autograd refuses, the library has to refuse as well."""
    refused = f"{type(error).__name__}: {str(error)[:100]}"
    hidden = (
        "modified by an inplace operation" in str(error) and run.error is None and case.options.pack_spikes
    )
    if hidden:
        unpacked = replace(case, options=replace(case.options, pack_spikes=False))
        if _library(unpacked, False).error is not None:
            return Verdict("speed-up fault", f"hides what autograd says: {refused}", "hidden")
    return Verdict("discarded", refused)


def _library(case: Case, fresh_trainers: bool) -> _Run:
    """The case as a user of the library runs it; with a new trainer for each iteration, it can learn nothing of them."""
    framework = reference.FRAMEWORKS[case.framework]
    iterations: list[Iteration] = []
    steps: list[tuple[int, ...]] = []
    selected = case.options.select
    last = min(
        (selected if isinstance(selected, int) else case.options.time_steps) * case.options.window,
        case.options.time_steps,
    )
    first = selected if isinstance(selected, tuple) else tuple(range(last))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", SLTTWarning)
        error: Exception | None = None
        net = framework.build(case)
        try:
            network = _converted(case, net)
            generator = torch.Generator().manual_seed(case.seed)
            head = Head()
            loss = _LossWithHead(head) if case.options.loss == "head" else _Loss()
            trainers: dict[str, sltt_ext.OnlineTrainer] = {}
            update = optimizer(net, head)
            for iteration in range(case.iterations):
                torch.default_generator.manual_seed(case.seed + iteration)
                data = batch(case, iteration)
                loss_on = case.loss_on(iteration)
                if loss_on not in trainers or fresh_trainers:
                    trainers[loss_on] = _trainer(case, network, net, loss, loss_on, generator, update)
                loss.of_iteration = loss_fn(case, net, head, data.x)
                update.zero_grad()
                with everywhere(case.everywhere, net, net.record):
                    result = trainers[loss_on].forward_backward(data.given(case), data.target)
                steps.append(result.time_steps)
                iterations.append(observed(case, net, head, data, result.loss, result.output, loss_on))
                update.step()
        except Exception as raised:  # all of them are looked at
            error = raised
    steps += [first] * (case.iterations - len(steps))
    said = [str(one.message)[:160] for one in caught if issubclass(one.category, SLTTWarning)]
    said = [message for message in said if not message.startswith(_EXCUSES_NOTHING)]
    return _Run(iterations, steps, error, said)


def _converted(case: Case, net: Net) -> nn.Module:
    for module in net.modules():
        if isinstance(module, networks_snntorch.NormsOfSteps):
            module.whole = case.form == "multi"
    if case.form == "stateful":
        return Stateful(sltt_ext.convert(WithState(net), temporal=case.options.temporal))
    sltt_ext.convert(net, temporal=case.options.temporal)
    return MultiStep(net) if case.framework == "snntorch" and case.form == "multi" else net


class _Loss:
    """The loss of the iteration that runs."""

    of_iteration: LossFn

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        return self.of_iteration(output, target)


class _LossWithHead(nn.Module):
    """The same as a module that shows its parameters."""

    of_iteration: LossFn

    def __init__(self, head: Head):
        super().__init__()
        self.head = head

    def forward(self, output: Any, target: Tensor) -> Tensor:
        return self.of_iteration(output, target)


def _trainer(
    case: Case,
    network: nn.Module,
    net: Net,
    loss: _Loss | _LossWithHead,
    loss_on: Any,
    generator: torch.Generator,
    update: torch.optim.Optimizer,
) -> sltt_ext.OnlineTrainer:
    options = case.options
    select = options.select

    def on_step(t: int) -> None:
        update.step()
        update.zero_grad()

    return sltt_ext.OnlineTrainer(
        network,
        loss,
        options.time_steps,
        k=select if isinstance(select, int) else None,
        schedule=(lambda time_steps, generator: list(select)) if isinstance(select, tuple) else None,
        generator=generator,
        chunk=options.chunk,
        memory_budget=options.memory_budget,
        scale=options.scale,
        time_dim={"time 0": 0, "time 1": 1}.get(options.frames),
        output=output_of(case),
        full_output=options.full_output,
        backward=backward(case, net),
        loss_on=loss_on,
        target_time_dim=options.target_time_dim,
        on_step=on_step if options.on_step else None,
        cache_invariant=options.cache_invariant,
        pack_spikes=options.pack_spikes,
    )


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
    for times in (1, -1, 3):
        noise = times * _ROUNDING[torch.get_default_dtype()]
        other = differences(list(reference.run(case, steps, noise))[-1], theirs, 0.0)
        by_rounding |= {name: max(error, by_rounding.get(name, 0.0)) for name, error in other.items()}
    return all(by_rounding.get(name, 0.0) > 0.2 * error for name, error in wrong.items())
