"""The contenders: who computes a gradient, on which network, and how. Each runs as its users run it.

``BPTT``, ``SLTT, SpikingJelly`` and ``rate-based`` are the peers; ``sltt_ext`` comes with each of its speed-ups off
and on. To contend, add a row to `peers` or to `SPEED_UPS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from weakref import WeakKeyDictionary

import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

import sltt_ext
from peers.networks import Network, Task
from peers.rate_based import RateLIFNode, rate_gradients
from sltt_ext.errors import BackendError
from sltt_ext.kernels import check_backend
from sltt_ext.methods import GradientTrainer, Method

Steps = tuple[int, ...]
Iterate = Callable[[nn.Module, Task, Steps], object]
Prepare = Callable[[Task], nn.Module]

PLAIN = "plain"
LEANEST, FASTEST = "cache_invariant, pack_spikes", "cache_invariant, chunk=T"
TOGETHER = (LEANEST, FASTEST)


def usable(backend: str) -> bool:
    """Whether a backend runs on this machine."""
    try:
        check_backend(backend)
    except BackendError:
        return False
    return True


_PLAIN = Method("sltt", cache_invariant=False, backend="torch")
ALL_SPEED_UPS = {
    PLAIN: _PLAIN,
    "cache_invariant": replace(_PLAIN, cache_invariant=True),
    "pack_spikes": replace(_PLAIN, pack_spikes=True),
    "inductor": replace(_PLAIN, backend="inductor"),
    "chunk=T": replace(_PLAIN, chunk="all"),
    "all": replace(_PLAIN, cache_invariant=True, pack_spikes=True, backend="inductor", chunk="all"),
    LEANEST: replace(_PLAIN, cache_invariant=True, pack_spikes=True),
    FASTEST: replace(_PLAIN, cache_invariant=True, chunk="all"),
}
"""SLTT with each speed-up alone, then with several."""
LEAST = replace(_PLAIN, chunk="auto", cache_invariant="auto", pack_spikes="auto", memory_budget="least")
"""The leanest plan there is, which may go block by block."""
SPEED_UPS = {
    name: method
    for name, method in ALL_SPEED_UPS.items()
    if method.backend != "inductor" or usable("inductor")
}


@dataclass(frozen=True)
class Contender:
    """A way to compute a gradient.

    Attributes:
        method: ``"BPTT"``, ``"SLTT"``, ``"SLTT-K"`` or ``"rate-based"``.
        by: Whose implementation, and which of its settings.
        network: Key of the network it needs: contenders with the same key share one.
        prepare: Builds that network.
        iterate: One training iteration without the optimizer: accumulates into ``.grad``.
        k: How many steps are back-propagated; None: all, or not for this method to say.
        full_output: The steps after the last selected one run as well.
    """

    method: str
    by: str
    network: str
    prepare: Prepare
    iterate: Iterate
    k: int | None = None
    full_output: bool = True

    @property
    def what(self) -> str:
        """What is computed, by whomever."""
        return self.method if self.full_output else f"{self.method}, tail skipped"

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.what}, {self.by}"

    @property
    def exact(self) -> bool:
        """Whether it claims SLTT's gradient."""
        return self.method.startswith("SLTT")


def bptt_steps(net: nn.Module, task: Task, _: Steps) -> None:
    functional.reset_net(net)
    losses = [task.loss(task.step(net, t)) for t in range(task.time_steps)]
    torch.stack(losses).mean().backward()
    functional.reset_net(net)


def bptt_sequence(net: nn.Module, task: Task, _: Steps) -> None:
    functional.reset_net(net)
    task.mean_loss(net(task.x_seq)).backward()
    functional.reset_net(net)


def spikingjelly_sltt(
    net: nn.Module, task: Task, selected: Steps, detach: bool = False, full_output: bool = True
) -> None:
    functional.reset_net(net)
    last = task.time_steps if full_output else selected[-1] + 1
    for t in range(last):
        with torch.set_grad_enabled(t in selected):
            loss = task.loss(task.step(net, t)) / len(selected)
        if t in selected:
            loss.backward()
        if detach:
            functional.detach_net(net)
    functional.reset_net(net)


class Online:
    """Iterations of sltt_ext's trainer, one for each network and batch, as a user has it."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self._selected: Steps = ()
        self._trainers: WeakKeyDictionary[nn.Module, tuple[Task, GradientTrainer]] = WeakKeyDictionary()

    def __call__(self, net: nn.Module, task: Task, selected: Steps) -> sltt_ext.OnlineResult:
        """One iteration."""
        self._selected = selected
        known = self._trainers.get(net)
        if known is None or known[0] is not task:
            known = self._trainers[net] = task, self._trainer(net, task)
        return known[1].forward_backward(task.x, task.target)

    def is_decided(self, net: nn.Module) -> bool:
        """Whether its plan for a network is decided."""
        known = self._trainers.get(net)
        return known is not None and known[1].plan.is_decided  # type: ignore[attr-defined, no-any-return]

    def _trainer(self, net: nn.Module, task: Task) -> GradientTrainer:
        return self.method.trainer(
            net, lambda output, target: task.loss(output), task.time_steps, time_dim=task.time_dim,
            schedule=lambda *_: self._selected,
        )  # fmt: skip


def converted(method: Method, task: Task) -> nn.Module:
    """The network for a method of sltt_ext: multi-step where its steps may share a call."""
    net = task.network.build(step_mode="s" if method.chunk == 1 else "m")
    return sltt_ext.convert(net, backend=method.backend)


def rate_based(net: nn.Module, task: Task, _: Steps, chunk: int | None = None) -> None:
    rate_gradients(net, task.x_seq, task.loss, chunk or task.time_steps)


def with_memopt(task: Task) -> nn.Module:
    """SpikingJelly's memory optimisation at its most: every block checkpointed, binary inputs kept as bits.

    That is level 1; the higher levels search by measuring on a CUDA device.
    """
    from spikingjelly.activation_based import memopt

    net = task.network.build(step_mode="m")
    memopt.optimize_memory(
        net, task.network.blocks(net), lambda net: net(task.x_seq), level=1, checkpoint_budget="memory"
    )
    functional.reset_net(net)
    return net


def framework(node: type[nn.Module], step_mode: str, task: Task) -> nn.Module:
    return task.network.build(node, step_mode)


def peers(network: Network) -> list[Contender]:
    """What sltt_ext is compared with."""
    lif = neuron.LIFNode
    # SLTTLIFNode is in SpikingJelly 2.0, for single steps; elsewhere users detach every neuron after every step
    detach = not (network.single_step and hasattr(neuron, "SLTTLIFNode"))
    sltt = partial(framework, lif if detach else neuron.SLTTLIFNode, "s")
    loop = partial(spikingjelly_sltt, detach=detach)
    steps = partial(framework, lif, "s")
    sequence = partial(framework, lif, "m")
    rates = partial(framework, RateLIFNode, "m")
    found = [
        Contender("BPTT", "steps", "steps", steps, bptt_steps),
        Contender("BPTT", "sequence", "sequence", sequence, bptt_sequence),
    ]
    if find_spec("spikingjelly.activation_based.memopt") is not None:
        found.append(Contender("BPTT", "memopt", "memopt", with_memopt, bptt_sequence))
    found.append(Contender("SLTT", "SpikingJelly", "SpikingJelly's SLTT", sltt, loop))
    found += [
        Contender(
            f"SLTT-{k}", "SpikingJelly", "SpikingJelly's SLTT", sltt, partial(loop, full_output=full), k, full
        )
        for k in (2, 1)
        for full in (True, False)
    ]  # fmt: skip
    return [
        *found,
        Contender("rate-based", "steps", "rates", rates, partial(rate_based, chunk=1)),
        Contender("rate-based", "sequence", "rates", rates, rate_based),
    ]


def ours() -> list[Contender]:
    """SLTT, SLTT-2 and SLTT-1 of sltt_ext, with every set of speed-ups; SLTT-2 with the common ones."""
    found = []
    for name, speed_ups in SPEED_UPS.items():
        for k, full in ((None, True), (2, True), (2, False), (1, True), (1, False)):
            if k == 2 and name not in (PLAIN, *TOGETHER):
                continue
            method, by = replace(speed_ups, k=k, full_output=full), f"sltt_ext, {name}"
            found.append(Contender(method.name, by, by, partial(converted, method), Online(method), k, full))
    return found


def leanest() -> Contender:
    """SLTT with the least memory."""
    by = 'sltt_ext, memory_budget="least"'
    return Contender("SLTT", by, by, partial(converted, LEAST), Online(LEAST))


def contenders(network: Network) -> list[Contender]:
    """All contenders for a network."""
    return [*peers(network), *ours()]
