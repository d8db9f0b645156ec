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
from fuzz.networks import WithState
from fuzz.training import Batch, Iteration, backward, batch, loss_fn, observed, optimizer, output_of
from torch import Tensor, nn

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
    update = optimizer(net)
    for iteration, selected in enumerate(steps):
        torch.default_generator.manual_seed(case.seed + iteration)
        data = batch(case, iteration)
        update.zero_grad()
        loss, output = Pass(case, network, data, selected, update).run()
        yield observed(case, net, data, loss, output)
        update.step()


class Network:
    """The original network, over any frames."""

    def __init__(self, case: Case, net: nn.Module):
        self.case, self.net = case, net
        self.framework: ModuleType = FRAMEWORKS[case.framework]
        self.whole = case.framework == "spikingjelly" and case.form == "multi"
        self.stepwise = WithState(net) if case.form == "stateful" else net
        self.state: Any = None
        if self.whole:
            self.framework.cut_between_steps(net)

    def reset(self) -> None:
        self.state = None
        self.framework.reset(self.net)

    def detach(self) -> None:
        self.framework.detach(self.net)
        if self.state is not None:
            self.state = [tuple(tensor.detach() for tensor in state) for state in self.state]

    def outputs(self, frames: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """The output of each frame."""
        if self.whole:
            return list(self._chosen(self.net(frames)))
        outputs = []
        for t, frame in enumerate(frames):
            if t:
                self.detach()
            outputs.append(self._step(frame))
        return outputs

    def _step(self, frame: Tensor) -> Tensor:
        if self.case.form != "stateful":
            return self._chosen(self.net(frame))
        returned, self.state = self.stepwise(frame, self.state)
        return self._chosen(returned)

    def _chosen(self, returned: Any) -> Tensor:
        if isinstance(returned, dict):
            return output_of(returned)
        if isinstance(returned, tuple):
            return returned[-1 if self.case.returns == "membrane" else 0]
        return returned


class Pass:
    """One iteration's way through time."""

    def __init__(
        self,
        case: Case,
        network: Network,
        data: Batch,
        selected: tuple[int, ...],
        update: torch.optim.Optimizer,
    ):
        self.case, self.network, self.data, self.selected, self.update = case, network, data, selected, update
        options = case.options
        self.divisor = len(selected) if options.scale == "mean" else options.time_steps
        self.loss_fn = loss_fn(case, network.net, data.x)
        self.backward = backward(case, network.net) or (lambda loss: loss.backward())

    def run(self) -> tuple[Tensor, Tensor]:
        if self.case.options.loss_on == "mean":
            return self._of_the_mean()
        all_steps = self.case.options.time_steps
        last = all_steps if self.case.options.full_output else self.selected[-1] + 1

        def loss_of_call(outputs: list[Tensor], start: int) -> Tensor:
            losses = [self.loss_fn(output, self._target(start + t)) for t, output in enumerate(outputs)]
            return torch.stack(losses).sum() / self.divisor

        loss, outputs = self._through_time(last, loss_of_call)
        return loss, torch.stack(outputs).mean(0)

    def _of_the_mean(self) -> tuple[Tensor, Tensor]:
        """The loss of the mean output; its gradient enters a second pass, which starts from the same surroundings."""
        random = torch.get_rng_state()
        buffers = {name: buffer.clone() for name, buffer in self.network.net.named_buffers()}
        x = self.data.x.detach().clone()
        _, outputs = self._through_time(self.case.options.time_steps, None)
        output = torch.stack(outputs).mean(0).requires_grad_()
        loss = self.loss_fn(output, self.data.target)
        (gradient,) = torch.autograd.grad(loss, output)
        torch.set_rng_state(random)
        with torch.no_grad():
            for name, buffer in self.network.net.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.data.copy_(buffers[name])
            self.data.x.data.copy_(x)

        def part(outputs: list[Tensor], start: int) -> Tensor:
            return sum((output * gradient).sum() for output in outputs) / self.divisor

        self._through_time(self.case.options.time_steps, part)
        return loss.detach(), output.detach()

    def _through_time(
        self, last: int, loss_of_call: Callable[[list[Tensor], int], Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
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
            all_outputs += [output.detach() for output in outputs]
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

    def _frames(self, start: int, stop: int) -> Tensor | list[Tensor]:
        x, frames = self.data.x, self.case.options.frames
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
