"""How many operators one training iteration launches, counted on the CPU: no device is needed.

python benchmarks/launches.py

Every operator that torch dispatches counts as one launch, except for views and for memory that is only allocated. An operator
on a list of tensors (``_foreach_``) counts as one, and so does a convolution's backward, which a device may run as several
kernels. A neuron counts as the kernels that its CUDA backend launches, one forward and one backward. Savings that are made only
on a device are switched on. The number of operators does not depend on sizes, so the images are small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from measure import write_results
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model.spiking_resnet import spiking_resnet18
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import sltt_ext
from sltt_ext.functional import lif_operator
from sltt_ext.kernels import cuda_lif, torch_lif
from sltt_ext.models import nf_resnet34
from sltt_ext.online import launching

T = 6
NEURON = "neuron"
PLAN = {"chunk": 1, "pack_spikes": False, "cache_invariant": True}
KINDS = {
    "neurons": (NEURON,),
    "layers": ("convolution", "convolution_backward", "mm", "addmm"),
    "norms": ("native_batch_norm", "native_batch_norm_backward"),
    "sums": ("add", "add_", "_foreach_add_", "sum"),
}
_ONLY_ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_ONLY_VIEWS = ("_unsafe_view", "squeeze_", "unsqueeze_", "lift_fresh", "alias")  # which do not say so


def count(iteration: Callable[[], object], warm_up: int = 11) -> Counter[str]:
    """The launches of an iteration, by operator, after the iterations in which the trainer watches the network."""
    with ExitStack() as device:
        device.enter_context(mock.patch.object(launching, "DEVICES", {"cpu"}))
        for _ in range(warm_up):
            iteration()
        launches = _Launches()
        device.enter_context(_neurons_on_cuda(launches))
        with launches:
            iteration()
    return launches.found


class _Launches(TorchDispatchMode):
    """Counts what launches something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name in _ONLY_ALLOCATES or name in _ONLY_VIEWS):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _neurons_on_cuda(launches: _Launches) -> Iterator[None]:
    """Neurons launch what the CUDA backend launches, and return what the reference computes."""

    def counted(name: str) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            getattr(cuda_lif, name)(*given, launch=lambda *_: launches.found.update([NEURON]))
            with _disable_current_modes():
                return getattr(torch_lif, name)(*given)

        return run

    kernels = mock.Mock(**{name: counted(name) for name in ("forward", "backward", "backward_through_time")})
    with mock.patch.object(lif_operator, "select_kernels", return_value=kernels):
        yield


def by_kind(found: Counter[str]) -> dict[str, int]:
    """All launches, and those of each kind."""
    kinds = {kind: sum(found[name] for name in names) for kind, names in KINDS.items()}
    return {"launches": found.total(), **kinds, "others": found.total() - sum(kinds.values())}


def resnet18() -> nn.Module:
    return spiking_resnet18(
        spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(), num_classes=10
    )


NETWORKS = {
    "SpikingJelly's spiking_resnet18": resnet18,
    "nf_resnet34": lambda: nf_resnet34(num_classes=10, width=8),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "SLTT, single-step": ("s", {}),
    "SLTT, single-step, pack_spikes": ("s", {"pack_spikes": True}),
    "SLTT-1, single-step": ("s", {"schedule": lambda time_steps, generator: [2]}),
    "SLTT, multi-step, chunk=1": ("m", {"chunk": 1}),
    "SLTT, multi-step, chunk=T": ("m", {"chunk": T}),
}


def sltt(make: Callable[[], nn.Module], step_mode: str, options: dict[str, Any]) -> Callable[[], object]:
    """An iteration of the trainer."""
    net = make()
    functional.set_step_mode(net, step_mode)
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, **{**PLAN, **options})
    x, target = torch.rand(2, 3, 32, 32), torch.tensor([1, 3])

    def iteration() -> None:
        net.zero_grad()
        online.forward_backward(x, target)

    return iteration


def bptt(make: Callable[[], nn.Module]) -> Callable[[], object]:
    """An iteration of BPTT: one call, and one backward pass through all time steps."""
    net = make()
    functional.set_step_mode(net, "m")
    sltt_ext.convert(net, temporal="call")
    x_seq, target = torch.rand(1, 2, 3, 32, 32).expand(T, -1, -1, -1, -1), torch.tensor([1, 3])

    def iteration() -> None:
        net.zero_grad()
        functional.reset_net(net)
        F.cross_entropy(net(x_seq).mean(0), target).backward()

    return iteration


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for network, make in NETWORKS.items():
        iterations = {name: sltt(make, *how) for name, how in METHODS.items()}
        iterations = {"BPTT, multi-step, one call": bptt(make), **iterations}
        for method, iteration in iterations.items():
            rows.append({"network": network, "method": method, "time_steps": T, **by_kind(count(iteration))})
    write_results("launches", rows)


if __name__ == "__main__":
    main()
