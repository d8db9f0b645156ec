"""SLTT's gradient by the framework's own means: the oracle. Nothing here knows the library.

The original network runs call after call, with each neuron's state a constant between two steps; the losses of a
call's steps are back-propagated at its end, and everything that a step leaves to the next one is cut. In a multi-step
network a call of C steps is the user's own network on C frames, so that its layers see what they would see.
"""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from fuzz import networks_snntorch, networks_spikingjelly
from fuzz.description import Case
from fuzz.hooks import everywhere
from fuzz.networks import Net, WithState
from fuzz.own_modules import Kept
from fuzz.training import (
    Batch,
    Head,
    Iteration,
    backward,
    batch,
    held,
    loss_fn,
    observed,
    optimizer,
    output_of,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

FRAMEWORKS = {"spikingjelly": networks_spikingjelly, "snntorch": networks_snntorch}


def run(case: Case, steps: Sequence[tuple[int, ...]], noise: float = 0.0) -> Iterator[Iteration]:
    """The iterations of ``case``.

    Args:
        case: Whose network and options.
        steps: Those that each iteration back-propagates.
        noise: Relative disturbance of all weights, to see whether rounding decides what comes out.
    """
    net = FRAMEWORKS[case.framework].build(case)
    if noise:
        generator = torch.Generator().manual_seed(case.seed)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator))
    network = Network(case, net)
    head = Head()
    update = optimizer(net, head)
    for iteration, selected in enumerate(steps):
        torch.default_generator.manual_seed(case.seed + iteration)
        data = batch(case, iteration)
        update.zero_grad()
        with everywhere(case.everywhere, net, net.record):
            loss, output = Pass(case, network, head, data, selected, update, iteration).run()
        yield observed(case, net, head, data, loss, output, case.loss_on(iteration))
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
            returned = self._chosen(self.net(frames))
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
            return self._chosen(self.net(frame))
        returned, self.state = self.stepwise(frame, self.state)
        return self._chosen(returned)

    def _chosen(self, returned: Any) -> Any:
        output = output_of(self.case)
        if callable(output):
            return output(returned)
        if isinstance(returned, tuple):
            return returned[-1 if self.case.returns == "membrane" else 0]
        return returned


class Pass:
    """One iteration's way through time."""

    def __init__(
        self,
        case: Case,
        network: Network,
        head: Head,
        data: Batch,
        selected: tuple[int, ...],
        update: torch.optim.Optimizer,
        iteration: int,
    ):
        self.case, self.network, self.data, self.selected, self.update = case, network, data, selected, update
        self.loss_on = case.loss_on(iteration)
        options = case.options
        self.divisor = len(selected) if options.scale == "mean" else options.time_steps
        self.loss_fn = loss_fn(case, network.net, head, data.x)
        self.backward = backward(case, network.net) or (lambda loss: loss.backward())

    def run(self) -> tuple[Tensor, Any]:
        """The loss and the mean output."""
        if self.loss_on == "mean":
            of_output_alone = self.case.options.loss in ("cross entropy", "squared")
            return self._of_the_mean() if of_output_alone else self._of_one_graph()
        all_steps = self.case.options.time_steps
        last = all_steps if self.case.options.full_output else self.selected[-1] + 1

        def loss_of_call(outputs: list[Any], start: int) -> Tensor:
            losses = [self.loss_fn(output, self._target(start + t)) for t, output in enumerate(outputs)]
            return torch.stack(losses).sum() / self.divisor

        loss, outputs = self._through_time(last, loss_of_call)
        return loss, _mean(outputs)

    def _of_the_mean(self) -> tuple[Tensor, Any]:
        """The loss of the mean output; its gradient enters a second pass, which starts from the same surroundings."""
        random = torch.get_rng_state()
        buffers = {name: buffer.clone() for name, buffer in self.network.net.named_buffers()}
        x = self.data.x.detach().clone()
        _, outputs = self._through_time(self.case.options.time_steps, None)
        output = tree_map(Tensor.requires_grad_, _mean(outputs))
        loss = self.loss_fn(output, self.data.target)
        gradients = torch.autograd.grad(loss, tree_leaves(output))
        torch.set_rng_state(random)
        with torch.no_grad():
            for name, buffer in self.network.net.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.data.copy_(buffers[name])
            self.data.x.data.copy_(x)

        def part(outputs: list[Any], start: int) -> Tensor:
            leaves = [zip(tree_leaves(output), gradients) for output in outputs]
            return sum((leaf * gradient).sum() for step in leaves for leaf, gradient in step) / self.divisor

        self._through_time(self.case.options.time_steps, part)
        return loss.detach(), tree_map(Tensor.detach, output)

    def _of_one_graph(self) -> tuple[Tensor, Any]:
        """The loss of the mean output where it reads weights and hooks' findings, too: one graph of all steps, cut between them."""
        times, outputs = self.case.options.time_steps / self.divisor, []
        self.network.reset()
        for start, stop in self._calls(self.case.options.time_steps):
            with torch.set_grad_enabled(start in self.selected):
                outputs += self.network.outputs(self._frames(start, stop))
            self.network.detach()
        self.network.reset()
        mean = _mean(
            [tree_map(lambda leaf: leaf.detach() + times * (leaf - leaf.detach()), o) for o in outputs]
        )
        loss = self.loss_fn(mean, self.data.target)
        self.backward(loss)
        return loss.detach(), tree_map(Tensor.detach, mean)

    def _through_time(
        self, last: int, loss_of_call: Callable[[list[Any], int], Tensor] | None
    ) -> tuple[Tensor, list[Any]]:
        total, all_outputs = torch.zeros(()), []
        self.network.reset()
        for start, stop in self._calls(last):
            selected = start in self.selected and loss_of_call is not None
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

    def _calls(self, last: int) -> Iterator[tuple[int, int]]:
        """Consecutive steps, all selected or none, at most `Case.reference_chunk` of them."""
        start = 0
        for t in range(1, last + 1):
            changes = t < last and (t in self.selected) != (start in self.selected)
            if t == last or changes or t - start == self.case.reference_chunk:
                yield start, t
                start = t

    def _frames(self, start: int, stop: int) -> Any:
        """The frames of a call: a list, or all in one where the network takes sequences."""
        x, extra = (self._frames_of(part, start, stop) for part in (self.data.x, self.data.extra))
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
