"""Random cases: a plain network with plain options, and on top of it a few of the odd things that users do."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fuzz import networks_snntorch, networks_spikingjelly
from fuzz.description import SEQUENCE_LOSSES, STATELESS_TIMES, Block, Case, Options
from fuzz.hooks import HOOKS
from fuzz.own_modules import ACTIVATIONS, FUNCTIONS, WEIGHTS

NORMS = ("", "", "", "", "not affine", "not tracking", "cumulative", "frozen", "group", "layer", "instance")
FUNCTION_NAMES = (*FUNCTIONS, "linear", "reads weight", "reads statistics")
STEP_NAMES = ("function", "call", "attribute", "tensor", "data", "assigned", "noise")
STATELESS = ("norm", "norm", "weight", "pool", "flatten")
KEPT = ("trace", "tuple", "feedback", "list", "detached", "average")
LOSSES = {  # how often each is drawn
    "cross entropy": 9,
    "squared": 2,
    "penalty": 1,
    "penalty of all": 1,
    "penalty of a computed weight": 1,
    "head": 1,
    "head in a closure": 1,
    "rates": 1,
    "saliency of a weight": 1,
}


def random_case(framework: str, seed: int) -> Case:
    """The case of a seed, the same at any time."""
    draw = random.Random(f"{framework} {seed}")
    if framework == "spikingjelly":
        form = draw.choice(["single", "multi"])
    else:
        form = draw.choice(["single"] * 4 + ["multi"] * 5 + ["stateful"])
    image = draw.random() < 0.4
    returns = draw.choice(
        ["tensor"] * 9 + ["tuple", "dict", "heads", "pair"] + ["membrane"] * 2 * (framework == "snntorch")
    )
    if form == "stateful" and returns == "membrane":
        returns = "tuple"
    options = _options(draw, form)
    case = Case(
        framework,
        seed,
        _blocks(draw, framework, image),
        form=form,
        returns=returns,
        image=image,
        batch=draw.choice([1, 2, 2, 3, 4, 4, 6]),
        training=draw.random() < 0.9,
        everywhere=draw.choice([""] * 24 + ["observe", "scale"]),
        iterations=3 if _finds_out(form, options) else 2,
        options=options,
    )
    for _ in range(draw.choice([0, 1, 1, 2, 2, 3, 3])):
        case = replace(case, blocks=draw.choice(ODDITIES)(draw, case))
    if framework == "spikingjelly" and form == "multi" and draw.random() < 0.4:
        case = replace(case, blocks=_time(draw, case))
    case = _counted(draw, _allowed(draw, case))
    case = _through_time(random.Random(f"through time {framework} {seed}"), case)
    return _planned(random.Random(f"plan {framework} {seed}"), case)


def _planned(draw: random.Random, case: Case) -> Case:
    """Some cases as a user has them who asks for nothing, with draws of their own, and iterations to try plans in."""
    options = case.options
    if (
        options.way != "trainer"
        or options.temporal == "call"
        or options.chunk not in (1, "auto")
        or draw.random() < 0.6
    ):
        return case
    if case.form == "multi" and options.loss == "rates":  # the hooks see all steps of a call at once
        return case
    budget = draw.choice([None, None, "least", 2**30, 30_000])
    options = replace(options, chunk="auto", memory_budget=budget, cache_invariant="auto", pack_spikes="auto")
    return replace(case, options=options, iterations=draw.choice([3, 8, 12]))


def _counted(draw: random.Random, case: Case) -> Case:
    """The case, with steps that may count some other number of times than once."""
    if not isinstance(case.options.select, tuple) or draw.random() < 0.5:
        return case
    counts = tuple(draw.choice([0.5, 1.0, 1.0, 3.0]) for _ in range(case.options.time_steps))
    return replace(case, options=replace(case.options, counts=counts))


def _through_time(draw: random.Random, case: Case) -> Case:
    """Some cases with windows of several steps, with draws of their own: the others stay what they are."""
    options = case.options
    if options.chunk == "auto" or options.inside or draw.random() < 0.8:
        return case
    if options.loss.startswith("saliency"):  # of one step: hooks on gradients see zeros at the others
        return case
    steps = options.time_steps
    chunk = min(options.chunk, steps) if case.form == "multi" else draw.choice([1, 2, 3, steps, steps])
    options = replace(options, temporal="call", chunk=min(chunk, steps))
    if isinstance(options.select, int):
        options = replace(options, select=min(options.select, -(-steps // options.window)))
    return replace(case, options=options)


def _finds_out(form: str, options: Options) -> bool:
    """Whether what an iteration has found out tells how the next ones run."""
    if options.way == "over_time":
        return options.memory_budget is not None
    return form == "multi" and (options.chunk == "auto" or options.select is not None)


def _blocks(draw: random.Random, framework: str, image: bool) -> tuple[Block, ...]:
    """A stem, a neuron, a body."""
    stem = [Block("weight")] if draw.random() < 0.85 else []
    stem += [_stateless(draw) for _ in range(draw.choice([0, 0, 1, 1, 2]))]
    body: list[Block] = []
    for _ in range(draw.choice([0, 1, 1, 2])):
        body += [_stateless(draw) for _ in range(draw.choice([0, 1]))]
        body += [Block("weight")] + [Block("norm", draw.choice(NORMS))] * (draw.random() < 0.4)
        body += [Block("neuron", _neuron(draw, framework))] * (draw.random() < 0.7)
    return (*stem, Block("neuron", _neuron(draw, framework)), *body)


def _stateless(draw: random.Random) -> Block:
    kind = draw.choice(["weight", "norm", "norm", "pool", "activation", "function", "dropout", "flatten"])
    variant = {
        "norm": lambda: draw.choice(NORMS),
        "pool": lambda: draw.choice(["average", "max", "adaptive"]),
        "activation": lambda: draw.choice([*ACTIVATIONS]),
        "function": lambda: draw.choice(["relu", "tanh", "scale", "shift", "linear"]),
    }.get(kind, lambda: "")()
    return Block(kind, variant)


def _neuron(draw: random.Random, framework: str) -> str:
    if draw.random() < 0.4:
        return ""
    if framework == "spikingjelly":
        return draw.choice([*networks_spikingjelly.NEURONS])
    known = {**networks_snntorch.NEURONS, **networks_snntorch.ONLY_DENSE, **networks_snntorch.ONLY_HIDDEN}
    return draw.choice([*known])


def _options(draw: random.Random, form: str) -> Options:
    steps = draw.choice([1, 2, 2, 2, 3, 3, 4, 4, 5, 6])
    chunk: Any = 1
    budget = None
    if form == "multi" or draw.random() < 0.1:
        chunk = draw.choice([1, 1, 2, 3, steps, "auto", "auto", "auto"])
        if form != "multi" and chunk != "auto":
            chunk = 1
        if chunk == "auto":
            budget = draw.choice([None, 2**30, 2**30, 30_000, 100_000])
    select: Any = None
    if draw.random() < 0.35:
        select = draw.randint(1, steps)
        if draw.random() < 0.5:
            select = tuple(sorted(draw.sample(range(steps), select)))
    frames = draw.choice(["static"] * 5 + ["time 0", "time 0", "time 1", "list", "iterator"])
    parts = draw.choice([""] * 8 + ["dict", "tuple" if frames in ("list", "iterator") else "dict"])
    input_gradient = draw.random() < 0.15
    options = Options(
        time_steps=steps,
        frames=frames,
        parts=parts,
        select=select,
        chunk=chunk,
        memory_budget=budget,
        scale=draw.choice(["mean", "mean", "paper"]),
        full_output=draw.random() < 0.7,
        cache_invariant=draw.random() < 0.85,
        pack_spikes=draw.random() < 0.5,
        loss=draw.choices([*LOSSES], [*LOSSES.values()])[0],
        soft=draw.random() < 0.1,
        backward=draw.choice([""] * 10 + ["scaled", "inputs"]),
        input_gradient=input_gradient,
    )
    if input_gradient and draw.random() < 0.2:
        options = replace(options, loss="saliency of the input")
    if draw.random() < 0.5:
        return _over_time(draw, options, form)
    if draw.random() < 0.15:
        frames = "list" if options.frames == "iterator" else options.frames
        loss_on = draw.choice(["mean", "mean", "alternate", *SEQUENCE_LOSSES])
        return _of_all_steps(replace(options, loss_on=loss_on, frames=frames))
    return replace(
        options, target_time_dim=draw.choice([None] * 4 + [0, 1]), on_step=draw.random() < 0.12
    )  # fmt: skip


def _over_time(draw: random.Random, options: Options, form: str) -> Options:
    """The options of ``over_time`` instead of the trainer."""
    inside = draw.choice([""] * 6 + ["mean", "head of the mean", "steps", "steps of a sample"])
    loss_on = draw.choice(["mean"] * 3 + [*SEQUENCE_LOSSES])
    chunk = draw.choice([1, 2, 3]) if form == "multi" else 1
    if inside in ("mean", "head of the mean") and chunk > 1:  # of which all steps cannot be told
        loss_on = "mean"
    return replace(
        options,
        way="over_time",
        frames="time 0" if options.frames in ("list", "iterator") else options.frames,
        chunk=chunk,
        memory_budget=draw.choice([None, None, None, 1, 5_000, 20_000, 60_000, 2**30]),
        scale="mean",
        full_output=True,
        loss_on=loss_on,
        loss=draw.choice(["cross entropy", "squared", "head"]) if options.loss == "rates" else options.loss,
        inside=inside,
        carry=draw.random() < 0.15,
        calls=draw.choice([1, 1, 1, 1, 2]),
        lengths=loss_on == "mean" and not inside and draw.random() < 0.2,
        front=draw.random() < 0.2,
    )


def _of_all_steps(options: Options) -> Options:
    """The options with a loss that may be taken of the outputs of all steps."""
    takes = [loss for loss in LOSSES if not loss.startswith("saliency") and loss != "rates"]
    return options if options.loss in takes else replace(options, loss="cross entropy")


Oddity = Callable[[random.Random, Case], tuple[Block, ...]]


def _changed(draw: random.Random, case: Case, kinds: Sequence[str], **changes: Any) -> tuple[Block, ...]:
    """The blocks with one of ``kinds`` changed; an entry of ``changes`` is what to draw from."""
    at = [i for i, block in enumerate(case.blocks) if block.kind in kinds]
    if not at:
        return case.blocks
    i = draw.choice(at)
    block = replace(case.blocks[i], **{name: draw.choice(values) for name, values in changes.items()})
    return (*case.blocks[:i], block, *case.blocks[i + 1 :])


def _inserted(draw: random.Random, case: Case, block: Block, first: int = 0) -> tuple[Block, ...]:
    """The blocks with another one, half of the times among the first: there most can be told of what it reads."""
    last = first + 1 if draw.random() < 0.5 else len(case.blocks)
    i = min(draw.randint(first, max(first, last)), len(case.blocks))
    return (*case.blocks[:i], block, *case.blocks[i:])


def _hook(draw: random.Random, case: Case) -> tuple[Block, ...]:
    return _changed(draw, case, ("weight", "norm", "neuron", "activation", "pool", "function"), hook=[*HOOKS])


def _weight(draw: random.Random, case: Case) -> tuple[Block, ...]:
    return _changed(draw, case, ("weight",), weight=[*WEIGHTS])


def _time(draw: random.Random, case: Case) -> tuple[Block, ...]:
    return _changed(draw, case, (draw.choice(STATELESS),), time=STATELESS_TIMES)


def _function(draw: random.Random, case: Case) -> tuple[Block, ...]:
    return _inserted(draw, case, Block("function", draw.choice(FUNCTION_NAMES)))


def _step(draw: random.Random, case: Case) -> tuple[Block, ...]:
    return _inserted(draw, case, Block("step", draw.choice(STEP_NAMES)))


def _shared(draw: random.Random, case: Case) -> tuple[Block, ...]:
    return _inserted(draw, case, Block("shared", draw.choice(["weight", "norm", "neuron", "activation"])), 1)


def _recurrent(draw: random.Random, case: Case) -> tuple[Block, ...]:
    variants = ["", "feedback"] if case.framework == "spikingjelly" else [*networks_snntorch.RECURRENT]
    return _inserted(draw, case, Block("recurrent", draw.choice(variants)))


def _dropout(draw: random.Random, case: Case) -> tuple[Block, ...]:
    variants = ["some", "kept mask"] if case.framework == "spikingjelly" else ["some"]
    return _inserted(draw, case, Block("dropout", draw.choice(variants)))


def _norm(draw: random.Random, case: Case) -> tuple[Block, ...]:
    return _inserted(
        draw, case, Block("norm", draw.choice(["through time", "list", "cumulative", "frozen", "", ""]))
    )


def _computing(draw: random.Random, case: Case) -> tuple[Block, ...]:
    """A neuron's parameters, or the potential that it starts from, computed in forward."""
    of_framework = networks_spikingjelly if case.framework == "spikingjelly" else networks_snntorch
    return _changed(draw, case, ("neuron",), variant=[*of_framework.COMPUTING])


def _kept(draw: random.Random, case: Case) -> tuple[Block, ...]:
    return _inserted(draw, case, Block("kept", draw.choice(KEPT)))


def _several(draw: random.Random, case: Case) -> tuple[Block, ...]:
    """Some blocks that run several times in a step."""
    start, stop = _some(draw, case)
    block = Block("several", draw.choice(["", "chain", "last"]), inner=case.blocks[start:stop])
    return (*case.blocks[:start], block, *case.blocks[stop:])


def _some(draw: random.Random, case: Case) -> tuple[int, int]:
    start = draw.randrange(len(case.blocks))
    return start, draw.randint(start + 1, len(case.blocks))


def _nested(draw: random.Random, case: Case) -> tuple[Block, ...]:
    """Some blocks in a row, as a residual branch, in a container, or in one that says it does not depend on time."""
    start, stop = _some(draw, case)
    inner = case.blocks[start:stop]
    choices = [("residual", ""), ("residual", "in place"), ("group", ""), ("group", "saves copies")]
    if all(block.kind in ("weight", "activation", "pool", "flatten") and not block.hook for block in inner):
        choices.append(("group", "marked"))
    kind, variant = draw.choice(choices)
    return (*case.blocks[:start], Block(kind, variant, inner=inner), *case.blocks[stop:])


ODDITIES: list[Oddity] = [
    _hook, _hook, _weight, _function, _function, _step, _shared, _recurrent, _dropout, _norm, _nested, _nested,
    _computing, _computing, _kept, _several,
]  # fmt: skip


def _allowed(draw: random.Random, case: Case) -> Case:
    """The case without what has no meaning."""
    if case.batch == 1 and case.training and not case.image and draw.random() < 0.9:
        case = replace(case, batch=2)  # batch norm of features refuses it
    if case.options.inside:  # what is another network at each step is so in the comparison, too
        case = replace(case, blocks=_without(case.blocks, lambda block: block.kind in ("step", "kept")))
    if _has(case, "group", "marked"):  # who marks a module asks for fewer calls of what is in it
        case = replace(case, everywhere="")
    if case.form != "multi":
        return case
    case = replace(case, blocks=_without(case.blocks, lambda block: block.kind in ("step", "kept")))
    if case.options.loss == "rates":  # the hooks see all steps of a call at once
        case = replace(case, options=replace(case.options, chunk=1, memory_budget=None))
    if case.options.frames == "static" and _may_change_its_input(case.blocks):  # which is expanded, or a copy
        case = replace(case, options=replace(case.options, frames="time 0"))
    if _has(case, "shared", "neuron") or _has(case, "several"):  # its steps come in another order
        case = _one_by_one(case)
    return _of_multi_step(case) if case.framework == "snntorch" else case


def _may_change_its_input(blocks: tuple[Block, ...]) -> bool:
    for block in blocks:
        if block.kind in ("weight", "norm", "pool"):
            return False
        if _any((block,), lambda one: "in place" in one.variant + one.hook):
            return True
    return False


BY_ORDER: list[Callable[[Block], bool]] = [  # layer by layer is another order than step by step
    lambda block: (block.kind, block.variant) == ("function", "reads statistics"),
    lambda block: (block.kind, block.variant) == ("shared", "norm"),
    lambda block: "spectral" in block.weight,
]


def _of_multi_step(case: Case) -> Case:
    """What snnTorch's networks can do in ``MultiStep``, which has to equal a loop."""
    if _has(case, "norm", "through time"):
        options = replace(case.options, chunk=case.options.time_steps, memory_budget=None, select=None)
        case = replace(case, options=options)
    if any(_any(case.blocks, condition) for condition in BY_ORDER):
        case = _one_by_one(case)
    return replace(
        case,
        blocks=_without(case.blocks, lambda block: (block.kind, block.variant) == ("dropout", "some")),
    )


def _one_by_one(case: Case) -> Case:
    """The case with calls of one step, as far as the user says."""
    return case if case.options.chunk == "auto" else replace(case, options=replace(case.options, chunk=1))


def _has(case: Case, kind: str, variant: str | None = None) -> bool:
    return _any(case.blocks, lambda block: block.kind == kind and variant in (None, block.variant))


def _any(blocks: tuple[Block, ...], condition: Callable[[Block], bool]) -> bool:
    return any(condition(block) or _any(block.inner, condition) for block in blocks)


def _without(blocks: tuple[Block, ...], meaningless: Callable[[Block], bool]) -> tuple[Block, ...]:
    return tuple(
        replace(block, inner=_without(block.inner, meaningless)) for block in blocks if not meaningless(block)
    )
