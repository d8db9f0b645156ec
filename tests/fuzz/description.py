"""What a case is: a network of blocks and the options of how it is trained, as plain data that prints as Python.

Seeded generators of our own make the cases, not hypothesis: a case has to shrink by what it means (a block dropped, a
hook taken off, an option back at its default), whatever the draws were that led to it, and a seed has to give the same
case in a year's time.
"""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace

STATELESS_TIMES = ("layer", "container", "multi", "loop", "fold")
WAYS = ("trainer", "over_time")
SEQUENCE_LOSSES = ("max over time", "each step", "count")
"""Losses of all steps: of the maximum over time, of each step and averaged (TET), of the sum over time."""


class _Short:
    """Prints what is not the default."""

    def __repr__(self) -> str:
        parts = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.default is MISSING and entry.default_factory is MISSING:
                parts.append(repr(value))
            elif value != (entry.default if entry.default is not MISSING else entry.default_factory()):
                parts.append(f"{entry.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, repr=False)
class Block(_Short):
    """A part of a network.

    Attributes:
        kind: See `fuzz.networks`.
        variant: Which of its kind; every kind has a default.
        time: How a multi-step network of SpikingJelly gives a stateless layer its steps: the framework's own layer,
            ``SeqToANNContainer``, ``MultiStepContainer``, a loop of the network's own, or folded into the batch.
        hook: What hangs on the module.
        weight: How its weight comes about.
        inner: The blocks it is made of.
    """

    kind: str
    variant: str = ""
    time: str = "layer"
    hook: str = ""
    weight: str = ""
    inner: tuple["Block", ...] = ()


@dataclass(frozen=True, repr=False)
class Options(_Short):
    """Options of the trainer or of ``over_time``, the input and the loss.

    Attributes:
        way: One of `WAYS`.
        frames: ``"static"``, ``"time 0"``, ``"time 1"``, ``"list"`` or ``"iterator"``.
        parts: What an input, or a frame of a list or iterator, is: ``""`` for a tensor, else a ``"dict"`` or
            ``"tuple"`` of two.
        select: None for every step, K for SLTT-K, or the steps themselves; through time, K windows.
        counts: How many times each of the T steps counts, where ``select`` names steps; none is once.
        temporal: Whether the gradient goes back through the steps of a ``"call"``, or through one ``"step"``.
        loss: See `fuzz.training.loss_fn`.
        loss_on: ``"step"``, ``"mean"``, or one of `SEQUENCE_LOSSES`; ``"alternate"`` is another trainer in each
            iteration, of steps, of the mean, and so on. There is no loss of a step over time, and the mean instead.
        soft: Whether the target holds probabilities of the classes instead of their numbers.
        backward: ``""``, ``"scaled"``, or ``"inputs"`` for a backward pass that names its inputs.
        input_gradient: Whether the input requires a gradient.
        inside: How the network runs over time in its own forward, if it does: it returns the ``"mean"``, something
            linear of it (``"head of the mean"``), or all steps, ``[T, N, ...]`` (``"steps"``) or ``[N, T, ...]``
            (``"steps of a sample"``).
        carry: Whether a call starts from the state that the last one has left.
        calls: How many calls there are before one backward, each of another view of the input.
        lengths: Whether each sample has a number of steps of its own.
        front: Whether there is an ordinary layer in front of the network.
    """

    way: str = "trainer"
    time_steps: int = 2
    frames: str = "static"
    parts: str = ""
    select: int | tuple[int, ...] | None = None
    counts: tuple[float, ...] = ()
    chunk: int | str = 1
    memory_budget: int | str | None = None
    scale: str = "mean"
    full_output: bool = True
    loss_on: str = "step"
    target_time_dim: int | None = None
    on_step: bool = False
    cache_invariant: bool | str = False
    pack_spikes: bool | str = False
    loss: str = "cross entropy"
    soft: bool = False
    backward: str = ""
    input_gradient: bool = False
    inside: str = ""
    carry: bool = False
    calls: int = 1
    lengths: bool = False
    front: bool = False
    temporal: str = "step"

    @property
    def window(self) -> int:
        """Through how many steps the gradient goes back."""
        return self.chunk if self.temporal == "call" and isinstance(self.chunk, int) else 1


@dataclass(frozen=True, repr=False)
class Case(_Short):
    """A network, how it is trained, and a few iterations with an optimizer's step after each.

    Attributes:
        framework: ``"spikingjelly"`` or ``"snntorch"``.
        form: ``"single"``, ``"multi"``, or, in snnTorch, ``"stateful"``.
        returns: What the network returns: ``"tensor"``, ``"tuple"`` or ``"dict"`` with an output that no loss reads,
            ``"heads"`` or ``"pair"`` for a dict or tuple of outputs that the loss reads, or, in snnTorch,
            ``"membrane"``: spikes and membrane potential of a last neuron.
        everywhere: What a hook on all modules at once does, see `fuzz.hooks.everywhere`.
        image: Whether the network starts with an image or with features.
    """

    framework: str
    seed: int
    blocks: tuple[Block, ...]
    form: str = "single"
    returns: str = "tensor"
    image: bool = False
    batch: int = 2
    training: bool = True
    everywhere: str = ""
    iterations: int = 1
    options: Options = field(default_factory=Options)

    def without_speed_ups(self) -> "Case":
        return replace(
            self,
            options=replace(
                self.options,
                chunk=self.options.window,
                memory_budget=None,
                cache_invariant=False,
                pack_spikes=False,
            ),
        )

    def count(self, t: int) -> float:
        """How many times a step counts."""
        counts = self.options.counts
        return counts[t] if counts and isinstance(self.options.select, tuple) else 1.0

    @property
    def reference_chunk(self) -> int:
        """How many steps a call of the network has, as far as that shows; ``"auto"`` must not show."""
        if self.options.chunk == "auto":
            return 1
        return self.options.chunk if self.form == "multi" else self.options.window

    def loss_on(self, iteration: int) -> str:
        """What the loss of an iteration is taken of: each step's output, or their mean."""
        loss_on = self.options.loss_on
        if self.options.way == "over_time" and loss_on in ("step", "alternate"):
            return "mean"
        return ("step", "mean")[iteration % 2] if loss_on == "alternate" else loss_on


def simpler(case: Case) -> Iterator[Case]:
    """All that is one thing simpler than ``case``, what simplifies most first."""
    for blocks in _simpler_blocks(case.blocks):
        yield replace(case, blocks=blocks)
    yield from _defaults(case, ("returns", "training", "everywhere", "iterations", "image", "batch"))
    if case.iterations > 2:
        yield replace(case, iterations=2)
    if case.form != "single":
        yield replace(case, form="single", options=replace(case.options, chunk=1, memory_budget=None))
    for options in _simpler_options(case.options):
        yield replace(case, options=options)


def _simpler_options(options: Options) -> Iterator[Options]:
    for entry in fields(options):
        if entry.name != "way":  # the other way cannot do all of it
            yield from _defaults(options, (entry.name,))
    if isinstance(options.select, int):
        yield replace(options, select=(options.time_steps - 1,))
    if isinstance(options.chunk, int) and options.chunk > 2:
        yield replace(options, chunk=2)
    if options.time_steps > 3 and not isinstance(options.select, tuple):
        yield replace(options, time_steps=3, select=min(options.select, 3) if options.select else None)


def _simpler_blocks(blocks: tuple[Block, ...]) -> Iterator[tuple[Block, ...]]:
    for i, block in enumerate(blocks):
        for instead in ((), block.inner, *((simple,) for simple in _simpler_block(block))):
            if instead or not block.inner or instead == ():
                yield (*blocks[:i], *instead, *blocks[i + 1 :])


def _simpler_block(block: Block) -> Iterator[Block]:
    yield from _defaults(block, ("hook", "weight", "time", "variant"))
    for inner in _simpler_blocks(block.inner):
        if inner:
            yield replace(block, inner=inner)


def _defaults(described: Block | Options | Case, names: tuple[str, ...]) -> Iterator:
    for entry in fields(described):
        if entry.name in names and getattr(described, entry.name) != entry.default:
            yield replace(described, **{entry.name: entry.default})
