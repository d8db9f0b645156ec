"""SLTT and SLTT-K with one interface: gradients of a converted network, step by step in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import ConfigurationError, LossError, is_out_of_memory
from sltt_ext.forwards import Replacements
from sltt_ext.neuron import StatefulModule
from sltt_ext.online import options
from sltt_ext.online.block_plan import Blocks, check_options
from sltt_ext.online.blocks import CompiledCode
from sltt_ext.online.counting import FirstCalls
from sltt_ext.online.cuda_graphs import IterationGraphs
from sltt_ext.online.distributed import is_distributed, synchronised_once
from sltt_ext.online.draws import Draws
from sltt_ext.online.frozen import Iteration as GraphedIteration
from sltt_ext.online.invariant_trials import InvariantModules
from sltt_ext.online.iterations import Iterations
from sltt_ext.online.kept_graphs import Found
from sltt_ext.online.lean_blocks import LeanBlocks
from sltt_ext.online.mixing import PartsTried
from sltt_ext.online.network import goes_through_time, neurons_of, whole_sequences
from sltt_ext.online.objective import (
    Backward,
    IterationLoss,
    LossFn,
    targets_of_steps,
    total_loss,
)
from sltt_ext.online.outputs import Output
from sltt_ext.online.outside import KeptTensors, UnknownNeurons
from sltt_ext.online.passes import Call
from sltt_ext.online.plan import Plan
from sltt_ext.online.planner import Asked, Planner
from sltt_ext.online.schedule import Schedule, longest_runs
from sltt_ext.online.snapshot import Snapshot
from sltt_ext.online.states import all_or_nothing, reset
from sltt_ext.sequence_trial import is_the_same_in_sequences

__all__ = ["OnlineResult", "OnlineTrainer"]


@dataclass(frozen=True)
class OnlineResult:
    """What one iteration gives besides the gradients.

    Attributes:
        loss: The total loss, a detached scalar tensor.
        output: The network's output, averaged over the steps that were run. It is detached, and float32 if the network's
            output is of half precision. If ``output=`` of the trainer picks several tensors, it holds each of them in the
            same structure.
        time_steps: The steps that were back-propagated, in order.
        output_steps: ``output`` is the mean of so many steps, from the first on: T, or fewer with ``full_output=False``.
    """

    loss: Tensor
    output: Any
    time_steps: tuple[int, ...]
    output_steps: int


class OnlineTrainer(Iterations):
    """Gradients of a converted network, step by step in time, with the memory of one step or of a few.

    For each back-propagated step, the network runs forward, the step's loss is back-propagated, and everything is freed before
    the next step. The gradient is SLTT's (Meng et al. 2023, Sec. 4): the sum over these steps of the spatial gradient. The
    optimizer stays yours:

        online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), loss_fn, time_steps=6)
        for x, target in loader:
            optimizer.zero_grad()
            online.forward_backward(x, target)
            optimizer.step()

    Args:
        net: A converted network, also inside DistributedDataParallel, ``fully_shard`` or ``torch.compile``.
        loss_fn: ``(output of one step, target) -> scalar``.
        time_steps: T, how many steps one input is shown.
        k: None back-propagates every step (SLTT). A number K back-propagates K of them (SLTT-K), and the others run without
            gradients. With ``convert(net, temporal="call")``, K counts windows of ``chunk`` steps.
        chunk: How many consecutive back-propagated steps go through the network in one call. A larger number saves time and
            needs the memory of ``chunk`` steps. ``"auto"`` plans it (see `plan`), and may run a network of single steps on
            sequences if all of its layers take both and the result is the same. A number above 1 needs a multi-step network,
            or ``convert(net, temporal="call")``. With the latter, the gradient goes back through the steps of a call
            (truncated BPTT; with T it is BPTT), and ``chunk`` is 1 if you do not give it. In a multi-step network, steps that
            are not back-propagated share a call as far as this needs no more memory than a back-propagated call.
        scale: ``"mean"`` averages the loss over the back-propagated steps, so that SLTT-K's gradient is an unbiased estimate
            of SLTT's. ``"paper"`` divides by T whatever K is.
        schedule: How the K steps are drawn. None or ``"random"`` draws any K steps. ``"stratified"`` draws one step of each
            K-th of the T steps. ``"early"`` draws late steps less often and counts them more. The gradient is unbiased with
            each. Instead of ``k``, you can give a function ``(time_steps, generator) -> indices`` of the steps to
            back-propagate, or ``-> {index: how many times its loss counts}``.
        generator: Source of the random steps; None is torch's default generator.
        time_dim: None shows the same ``x`` ``[N, ...]`` at every step; 0 or 1 is the time axis of ``x``, ``[T, N, ...]`` or
            ``[N, T, ...]``. A dict of tensors is one input with several parts. Any other iterable is a stream of T frames,
            each a tensor, or a dict or tuple of tensors.
        output: What the loss reads of the network's return value. None or ``"spike"`` takes the tensor itself or the first of
            a tuple, ``"membrane"`` the last of a tuple. A function can take anything else, also several tensors in a dict,
            tuple or list.
        full_output: False stops after the last back-propagated step, which saves time and gives the same gradient.
            ``result.output`` is then the mean over ``result.output_steps`` steps.
        backward: How a loss is back-propagated; default ``loss.backward()``. For mixed precision, give
            ``lambda loss: scaler.scale(loss).backward()``.
        loss_on: ``"step"`` takes the loss of every step's output and averages the losses. ``"mean"`` takes one loss of the
            output averaged over all T steps, ``"sequence"`` one loss of all steps ``[T, N, ...]``. For these two the network
            runs twice: first without keeping a graph, then again in backward, step by step. If K steps are back-propagated,
            the gradient is their part of it, times T / K with ``scale="mean"``.
        target_time_dim: The time axis of a target that differs from step to step. None gives the same target to every step.
        on_step: Called with the number t of the time step after each back-propagation, for an update at every step:
            ``lambda t: (optimizer.step(), optimizer.zero_grad())``.
        memory_budget: Bounds the memory of what is ``"auto"``: activations, states and gradients. Give bytes, text such as
            ``"6GiB"``, or ``"0.8"`` for a part of the memory that a CUDA device has left (of all memory on the CPU). The
            fastest plan that fits is taken. ``"least"`` takes the leanest plan, which may go block by block (see
            ``blocks``). None takes the leanest plan that needs at most 15 % more time than the fastest.
        cache_invariant: Evaluate what does not depend on time once an iteration. This means every weight parametrisation and,
            if one input is shown at all steps, every time-invariant module before the first neuron. The first iteration
            evaluates them at every step, and leaves out those whose output, weights or gradient turn out to depend on the
            step. Modules that torch.compile runs are left out, and with ``on_step`` all are. Your own module takes part if it
            has the attribute ``sltt_time_invariant = True``.
        pack_spikes: Store spikes that are saved for backward as bits, and of average pooling's input only the shape. This
            needs less memory and a little more time. ``"auto"`` plans it, as for ``cache_invariant``.
        blocks: Go through the network block by block: all T steps of a block, then the next block. The output of each block is
            kept for all steps (spikes as bits), but its states are not. Each block except the last runs once more.
            ``"auto"`` finds the blocks. Or give modules of the network: each becomes a block, and so do the parts between
            them. Neurons are at rest afterwards. Blocks whose layers treat each sample by itself run a part of the batch at
            a time.
        graph: Experimental: run whole iterations as CUDA graphs, with one launch instead of thousands, after the first few
            iterations. It needs a CUDA device, one process and a loss per step. An error names what cannot be captured.
            Python runs only while an iteration is captured, so anything that is not a tensor (such as a weight in the loss)
            keeps the value that it had then. The states are at rest after each iteration. Each draw of SLTT-K has its own
            graph.
        wrapper: The DistributedDataParallel module around ``net``, if ``net`` is called without it (as inside a
            LightningModule). None if ``net`` itself is the wrapped network.
        compile: Compile the network by blocks (`torch.compile`), from the second iteration on. What is time-invariant is still
            evaluated once, and the network itself does not change. ``"try"`` runs a network that cannot be compiled as it is.

    Raises:
        ConfigurationError: If an option cannot work.
        SLTTError: If ``net`` is not converted.
    """

    def __init__(
        self,
        net: nn.Module,
        loss_fn: LossFn,
        time_steps: int,
        k: int | None = None,
        chunk: int | Literal["auto"] = options.UNASKED,
        *,
        scale: options.Scale = "mean",
        schedule: Schedule | Draws | None = None,
        generator: torch.Generator | None = None,
        time_dim: options.TimeDim | None = None,
        output: Output = None,
        full_output: bool = True,
        backward: Backward | None = None,
        loss_on: options.LossOn = "step",
        target_time_dim: options.TimeDim | None = None,
        on_step: Callable[[int], Any] | None = None,
        memory_budget: int | str | None = None,
        cache_invariant: bool | Literal["auto"] = "auto",
        pack_spikes: bool | Literal["auto"] = "auto",
        graph: bool = False,
        blocks: Literal["auto"] | Sequence[nn.Module] | None = None,
        wrapper: nn.Module | None = None,
        compile: bool | Literal["try"] = False,
    ) -> None:
        self.net = options.network(net, loss_fn)
        self.loss_fn = options.loss_of_a_step(loss_fn)
        self.time_steps = options.count("time_steps", time_steps)
        self._through_time = goes_through_time(net.modules())
        asked = chunk is not options.UNASKED
        self.chunk = options.chunk_size(chunk) if asked or not self._through_time else 1
        self.scale = options.one_of("scale", scale, ("mean", "paper"), "'mean' or 'paper'")
        self._window = options.window(self.chunk, self.time_steps) if self._through_time else 1
        self.schedule = options.selection(k, schedule, self.time_steps, self._window)
        self._drawn = self._window if k is not None else None
        self.generator = generator
        self.time_dim = options.axis("time_dim", time_dim)
        self.output = options.reads(output)
        self.full_output = full_output
        self.backward = backward
        self.loss_on = options.one_of(
            "loss_on", loss_on, ("step", "mean", "sequence"), "'step', 'mean' or 'sequence'"
        )
        self.target_time_dim = options.axis("target_time_dim", target_time_dim)
        self.on_step = on_step
        if self.loss_on != "step":
            options.one_loss(self.loss_on, target_time_dim, on_step)
        self.cache_invariant = options.on_or_off("cache_invariant", cache_invariant)
        self.pack_spikes = options.on_or_off("pack_spikes", pack_spikes)
        if blocks is not None or compile:  # these options bring their own plan
            self.chunk = self.chunk if asked else 1
            self.cache_invariant = bool(self.cache_invariant)
            self.pack_spikes = self.pack_spikes is True or (self.pack_spikes == "auto" and not compile)
        if blocks is not None:
            check_options(self.loss_on, on_step, self.chunk, in_windows=False)
        self.memory_budget = options.budget(memory_budget, self.chunk, self.pack_spikes, self.cache_invariant)
        self.wrapper = wrapper
        self._graphs = IterationGraphs() if options.graph(graph, self._not_captured()) else None
        self.blocks = blocks
        self._blocks = None if blocks is None else Blocks(blocks)
        self._is_measuring = False
        self.compile = options.compiles(compile)
        self._code = CompiledCode(self.compile)
        self._common: torch.Generator | None = None
        self._modules = InvariantModules()
        updates = on_step is not None
        self._planner = Planner(
            Asked(
                self.chunk,
                self.pack_spikes,
                False if updates or self._window > 1 else self.cache_invariant,
                self.memory_budget,
                explicit=asked and self.chunk == "auto",
                updates=updates,
                blocks=self._may_choose_blocks(),
            ),
            self.time_steps,
            is_the_same_in_sequences,
            self._modules.number,
        )
        self._grouping = self._planner.grouping
        self._lean = LeanBlocks(self._planner)
        self._kept = KeptTensors()
        self._found = Found()
        self._tried = PartsTried(self._grouping.keep_apart)
        self._first = FirstCalls()
        self._unknown = UnknownNeurons("the trainer")
        self._neurons()
        options.called_with_one_input(net)

    @property
    def plan(self) -> Plan:
        """How iterations are run, as far as it is decided: ``print(online.plan)``.

        The first few iterations decide what is ``"auto"``. Each runs in another way, with the same gradient, and measures
        bytes and, if it matters, seconds. (Seconds do not count under ``torch.use_deterministic_algorithms``, so that each
        run makes the same calls.) Larger inputs are measured anew.
        """
        return self._planner.plan()

    def forward_backward(self, x: Any, target: Any, *, sync: bool = True) -> OnlineResult:
        """Accumulate the gradient of one batch into ``.grad``.

        Args:
            x: The input; see ``time_dim``.
            target: Passed to the loss at every step; see ``target_time_dim``.
            sync: With several processes: whether gradients are synchronised at the end. To accumulate over several
                batches, give False for all but the last, as with ``no_sync()``.

        Raises:
            InputError: If ``x`` or the target does not have ``time_steps`` steps, is empty, or has a graph that
                every time step would free.
            ConfigurationError: If ``chunk`` or the schedule does not fit, or another pass runs in the middle of this one.
            LossError: If the loss is not a scalar tensor, if it depends on nothing that can be trained, or if an optimizer
                updates the network in the middle of the iteration.

        After any exception the gradients are what they were before the call, and the state is reset.
        """
        neurons, _ = self._neurons()
        self._unknown.say(self.net)
        if not torch.is_grad_enabled():
            raise LossError("gradients are disabled: call forward_backward outside of torch.no_grad()")
        counts = self._steps()
        if self._graphs is not None:
            return self._graphs.run(self._iteration_for_graphs(x, neurons), x, target, counts)  # type: ignore[no-any-return]
        while True:
            undone = self._undone(x)
            try:
                return self._back_propagated(x, target, counts, sync)
            except Exception as error:
                if undone is None or not is_out_of_memory(error):
                    raise
            undone.restore()  # here, where the error holds no tensors any more
            self._planner.ran_out(self.net)

    def _undone(self, x: Any) -> Snapshot | None:
        """What takes back an iteration that tries a plan which may need too much memory; None where none does, or it cannot be."""
        once = isinstance(x, Iterator) or is_distributed(self.wrapper or self.net)
        if once or not self._planner.tries_long_calls:
            return None
        changed = [self.net, self.loss_fn]  # a loss may keep something, too
        return Snapshot(nn.ModuleList(one for one in changed if isinstance(one, nn.Module)))

    def _back_propagated(
        self, x: Any, target: Any, counts: Mapping[int, float], sync: bool = True
    ) -> OnlineResult:
        """`forward_backward`, with the steps that were drawn."""
        neurons, multi_step = self._neurons()
        steps = tuple(counts)
        divisor = self._divisor(steps)
        stop = self.time_steps if self.full_output or self.loss_on != "step" else steps[-1] + 1
        targets = targets_of_steps(target, self.time_steps, self.target_time_dim)

        def loss_of_call(output_seq: Any, call: Call) -> Tensor:
            own = [counts[t] for t in range(call.start, call.stop)]
            return total_loss(self.loss_fn, output_seq, targets[call.start : call.stop], own) / divisor

        synchronised = synchronised_once(self.wrapper or self.net, sync, self.on_step is not None)
        loss: Tensor | None
        whole = all_or_nothing(self._leaves(x), partial(reset, neurons))
        with whole, whole, synchronised as step:  # entered twice, in case of an interrupt
            iteration = self._iteration(x, neurons, multi_step, longest_runs(stop, steps), sync)
            if self.loss_on != "step":
                loss, output = self._whole(x, target, counts, divisor, iteration, step)
            else:
                loss, output = self._run(
                    x, stop, iteration, steps, loss_of_call, step, self._guards(x, target)
                )
            self._planner.learn(self.net, iteration, self._combined)
        assert loss is not None  # the schedule selects at least one step
        return OnlineResult(IterationLoss.of(loss), output, steps, stop)

    def predict(self, x: Any) -> Any:
        """The network's output averaged over all T steps, without gradients; as for the loss, ``output`` picks the tensors.

        You choose whether the network is in training or evaluation mode: this method does not change it.

        Raises:
            InputError: If ``x`` does not have ``time_steps`` steps, or is empty.
        """
        neurons, multi_step = self._neurons()
        block = Replacements()
        with block, block, torch.no_grad():
            iteration = self._iteration(
                x, neurons, multi_step, longest_runs(self.time_steps, ()), learns=False
            )
            return self._run(x, self.time_steps, iteration)[1]

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator that draws the steps, and what was found out about the network; for checkpoints.

        The state of the generator is None if the trainer draws from torch's default generator: save that with torch.
        """
        generator = self._common or self.generator
        return {
            "generator": None if generator is None else generator.get_state(),
            "plan": self._planner.state_dict(),
            "time-invariant": self._modules.state_dict(self.net),
            "blocks": (self._blocks or self._lean.blocks).state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a saved trainer stopped.

        Args:
            state: What `state_dict` returned.

        Raises:
            ConfigurationError: If the trainer has a generator and the state has none.
        """
        saved = state["generator"]
        if saved is None and self.generator is not None:
            raise ConfigurationError(
                "the checkpoint is of a trainer without generator=: leave it out here, too"
            )
        if "calls" not in state:  # earlier versions had no plan: it is measured anew
            self._planner.load_state_dict(state["plan"])
        if "time-invariant" in state:  # earlier versions have no such entry
            self._modules.load_state_dict(self.net, state["time-invariant"])
        if "blocks" in state:
            (self._blocks or self._lean.blocks).load_state_dict(state["blocks"])
        if saved is None:
            return
        if self.generator is None:
            self.generator = torch.Generator()
        self.generator.set_state(saved.cpu())
        self._common = None

    def _iteration_for_graphs(self, x: Any, neurons: list[StatefulModule]) -> GraphedIteration:
        return GraphedIteration(
            self.net, self.loss_fn, self._leaves(x), self._back_propagated, partial(reset, neurons),
            lambda: not self._is_measuring, self._not_captured(),
        )  # fmt: skip

    def _not_captured(self) -> dict[str, str]:
        """Options that a graph does not go with."""
        return options.not_captured(self.on_step, self.backward, self.loss_on, self.wrapper)

    def _may_choose_blocks(self) -> bool:
        """Whether the plan may go block by block without being told to."""
        own = self.loss_on != "step" or self.on_step is not None or self.chunk != "auto"
        return self.memory_budget == "least" and not (own or self._through_time or self._graphs)

    def _leaves(self, x: Any) -> list[Tensor]:
        """Everything that an iteration gives a gradient to."""
        leaves: list[Tensor] = list(self.net.parameters())
        if isinstance(self.loss_fn, nn.Module):
            leaves += self.loss_fn.parameters()
        return [*leaves, *(leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor))]

    def _neurons(self) -> tuple[list[StatefulModule], bool]:
        """The network's neurons, and whether the network takes sequences."""
        if goes_through_time(self.net.modules()) != self._through_time:
            raise ConfigurationError(
                "the network was converted with another temporal= than when the trainer was made: make a new trainer"
            )
        chosen = None if self.chunk == "auto" else self.chunk
        neurons, multi_step = neurons_of(self.net, chosen or 1)
        chunk = chosen or self.time_steps
        whole_sequences(neurons, self.time_steps, chunk, self.schedule is not None)
        return neurons, multi_step
