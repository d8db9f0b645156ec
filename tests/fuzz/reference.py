"""SLTT's gradient by the framework's own means: the oracle. Nothing here knows the library.

The original network runs call after call, with each neuron's state a constant between two steps; the losses of a
call's steps are back-propagated at its end, and everything that a step leaves to the next one is cut. In a multi-step
network a call of C steps is the user's own network on C frames, so that its layers see what they would see.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from fuzz import networks_snntorch, networks_spikingjelly
from fuzz.description import SEQUENCE_LOSSES, Case
from fuzz.hooks import everywhere
from fuzz.networks import Net, WithState
from fuzz.own_modules import Kept
from fuzz.training import (
    Around,
    Batch,
    Iteration,
    backward,
    batch,
    chosen,
    held,
    loss_fn,
    loss_of_calls,
    observed,
    optimizer,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

FRAMEWORKS: dict[str, Any] = {"spikingjelly": networks_spikingjelly, "snntorch": networks_snntorch}


def run(case: Case, steps: Sequence[tuple[int, ...]], noise: float = 0.0) -> Iterator[Iteration]:
    """The iterations of ``case``.

    Args:
        case: Whose network and options.
        steps: Those that each iteration back-propagates; of several calls, counted on from call to call.
        noise: Relative disturbance of all weights, to see whether rounding decides what comes out.
    """
    net = FRAMEWORKS[case.framework].build(case)
    if noise:
        generator = torch.Generator().manual_seed(case.seed)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator))
    network = Network(case, net)
    around = Around()
    update = optimizer(net, around)
    for iteration, selected in enumerate(steps):
        torch.default_generator.manual_seed(case.seed + iteration)
        data = batch(case, iteration)
        update.zero_grad()
        with everywhere(case.everywhere, net, net.record):
            loss, output = Pass(case, network, around, data, selected, update, iteration).run()
        yield observed(case, net, around, data, loss, output, case.loss_on(iteration))
        update.step()


class Network:
    """The original network, over any frames."""

    def __init__(self, case: Case, net: Net):
        self.case, self.net = case, net
        self.framework: ModuleType = FRAMEWORKS[case.framework]
        self.whole = case.framework == "spikingjelly" and case.form == "multi"
        self.stepwise = WithState(net) if case.form == "stateful" else net
        self.state: Any = None
        self.keepers = [module for module in net.modules() if isinstance(module, Kept)]
        self.goes_on = case.options.temporal == "call"
        if self.whole and not self.goes_on:
            self.framework.cut_between_steps(net)

    def reset(self) -> None:
        self.state = None
        self.framework.reset(self.net)
        for keeper in self.keepers:
            keeper.rest()

    def detach(self) -> None:
        self.framework.detach(self.net)
        for keeper in self.keepers:
            keeper.detach()
        if self.state is not None:
            self.state = [tuple(tensor.detach() for tensor in state) for state in self.state]

    def outputs(self, frames: Any) -> list[Any]:
        """What the loss reads of each frame's output."""
        if self.whole:
            returned = chosen(self.case, self.net(frames))
            steps = len(tree_leaves(returned)[0])
            return [tree_map(lambda output_seq, t=t: output_seq[t], returned) for t in range(steps)]
        outputs = []
        for t, frame in enumerate(frames):
            if t and not self.goes_on:
                self.detach()
            outputs.append(self._step(frame))
        return outputs

    def _step(self, frame: Any) -> Any:
        if self.case.form != "stateful":
            return chosen(self.case, self.net(frame))
        returned, self.state = self.stepwise(frame, self.state)
        return chosen(self.case, returned)


class Pass:
    """One iteration's way through time."""

    def __init__(
        self,
        case: Case,
        network: Network,
        around: Around,
        data: Batch,
        selected: tuple[int, ...],
        update: torch.optim.Optimizer,
        iteration: int,
    ):
        self.case, self.network, self.around, self.data = case, network, around, data
        self.call, self.selected, self.update = data, selected, update
        self.loss_on = case.loss_on(iteration)
        options = case.options
        self.divisor: float = options.time_steps
        if options.scale == "mean" and options.window > 1 and isinstance(options.select, int):
            self.divisor *= options.select / -(-options.time_steps // options.window)
        elif options.scale == "mean":
            self.divisor = len(selected) / options.calls
        self.loss_fn = loss_fn(case, network.net, around, data.x)
        self.backward = backward(case, network.net) or (lambda loss: loss.backward())

    def run(self) -> tuple[Tensor, Any]:
        """The loss, and the mean output or what each call has returned."""
        if self.loss_on != "step":
            return self._of_all_steps()
        all_steps = self.case.options.time_steps
        last = all_steps if self.case.options.full_output else self.selected[-1] + 1

        def loss_of_call(outputs: list[Any], start: int) -> Tensor:
            losses = [
                self.case.count(t) * self.loss_fn(output, self._target(t))
                for t, output in enumerate(outputs, start)
            ]
            return torch.stack(losses).sum() / self.divisor

        loss, outputs = self._through_time(last, loss_of_call)
        return loss, _mean(outputs)

    def _of_all_steps(self) -> tuple[Tensor, Any]:
        """One loss of the outputs of all steps: one graph, cut between steps, and one backward."""
        options, outputs = self.case.options, []
        for call in range(options.calls):
            if not options.carry:
                self.network.reset()
            offset = call * options.time_steps
            self.call = self.data.view(self.case, call, self.around)
            outputs.append(self._sequence({t - offset for t in self.selected}))
        if not options.carry:
            self.network.reset()
        of_steps = self.loss_on in SEQUENCE_LOSSES
        returned = outputs if of_steps else [tree_map(self._mean, output) for output in outputs]
        loss = loss_of_calls(self.loss_on, self.loss_fn, returned, self.data.target)
        self.backward(loss)
        if options.way == "trainer":
            returned = tree_map(self._mean, outputs[0])
        return loss.detach(), tree_map(Tensor.detach, returned)

    def _sequence(self, selected: Collection[int]) -> Any:
        """The outputs of one call ``[T, N, ...]``, with T / K of the gradient of K steps."""
        options, outputs = self.case.options, []
        for start, stop in self._calls(options.time_steps, selected):
            with torch.set_grad_enabled(start in selected):
                outputs += self.network.outputs(self._frames(start, stop))
            self.network.detach()
        if options.inside == "head of the mean":
            outputs = [tree_map(self.around.behind, output) for output in outputs]
        times = options.time_steps / self.divisor
        constants = [tree_map(Tensor.detach, output) for output in outputs]
        parts = [times * self.case.count(t) if t in selected else 0.0 for t in range(len(outputs))]
        steps = [
            tree_map(lambda c, o, part=part: c + part * (o - c) if part else c, constant, output)
            for part, constant, output in zip(parts, constants, outputs)
        ]
        return tree_map(lambda *steps: torch.stack(steps), *steps)

    def _mean(self, output_seq: Tensor) -> Tensor:
        """Over the steps of a call, or over those of each sample."""
        if not self.case.options.lengths:
            return output_seq.mean(0)
        lengths = self.data.lengths
        counted = torch.arange(len(output_seq)).unsqueeze(1) < lengths
        weights = (counted / lengths).to(output_seq.dtype)
        return (output_seq * weights.view(*weights.shape, *[1] * (output_seq.dim() - 2))).sum(0)

    def _through_time(
        self, last: int, loss_of_call: Callable[[list[Any], int], Tensor]
    ) -> tuple[Tensor, list[Any]]:
        total, all_outputs = torch.zeros(()), []
        self.network.reset()
        for start, stop in self._calls(last, self.selected):
            selected = start in self.selected
            with torch.set_grad_enabled(selected):
                outputs = self.network.outputs(self._frames(start, stop))
            if selected:
                loss = loss_of_call(outputs, start)
                self.backward(loss)
                total = total + loss.detach()
            all_outputs += [tree_map(Tensor.detach, output) for output in outputs]
            del outputs
            self.network.detach()
            if selected and self.case.options.on_step:
                self.update.step()
                self.update.zero_grad()
        self.network.reset()
        return total, all_outputs

    def _calls(self, last: int, selected: Collection[int]) -> Iterator[tuple[int, int]]:
        """Consecutive steps, all selected or none, at most `Case.reference_chunk` of them."""
        start = 0
        for t in range(1, last + 1):
            changes = t < last and (t in selected) != (start in selected)
            if t == last or changes or t - start == self.case.reference_chunk:
                yield start, t
                start = t

    def _frames(self, start: int, stop: int) -> Any:
        """The frames of a call: a list, or all in one where the network takes sequences."""
        x, extra = (self._frames_of(part, start, stop) for part in (self.call.x, self.call.extra))
        if self.network.whole:
            return held(self.case, x, extra)
        return [held(self.case, *parts) for parts in zip(x, extra)]

    def _frames_of(self, x: Tensor, start: int, stop: int) -> Tensor | list[Tensor]:
        frames = self.case.options.frames
        if frames == "static":
            return (
                x.unsqueeze(0).expand(stop - start, *x.shape) if self.network.whole else [x] * (stop - start)
            )
        if frames in ("list", "iterator") and self.network.whole:
            return torch.stack(list(x[start:stop]))
        return (x.transpose(0, 1) if frames == "time 1" else x)[start:stop]

    def _target(self, t: int) -> Tensor:
        dim = self.case.options.target_time_dim
        return self.data.target if dim is None else self.data.target.select(dim, t)


def _mean(outputs: Sequence[Any]) -> Any:
    return tree_map(lambda *steps: torch.stack(steps).mean(0), *outputs)
