"""`import sltt_ext.clock_driven`, before a code base's own imports, runs code for SpikingJelly 0.0.0.0.12 on a newer one.

It puts `spikingjelly.clock_driven` in its place, and `spikingjelly.cext`, which still older code has: the neurons and the layers
with a state, written anew with the names, the arguments and the numbers of the old package, and all else as the installed
SpikingJelly has it. Where the old package itself is installed, nothing is done. `sltt_ext.convert` knows both.

``backend="cupy"`` is taken and not used: what is converted runs on sltt_ext's kernels, all else on PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from sltt_ext.optional import require

__all__: list[str] = []

_OURS = ("base", "functional", "layer", "neuron", "surrogate")
_NEWER = ("encoding", "monitor", "rnn")


def _put_in_place(name: str, module: ModuleType) -> None:
    parent, _, child = name.rpartition(".")
    sys.modules[name] = module
    setattr(sys.modules[parent], child, module)


def _package(name: str) -> None:
    package = ModuleType(name, __doc__)
    package.__path__ = []
    package.__spec__ = ModuleSpec(name, None, is_package=True)
    _put_in_place(name, package)


def _install() -> None:
    _package("spikingjelly.clock_driven")
    for name in _OURS:
        _put_in_place(f"spikingjelly.clock_driven.{name}", importlib.import_module(f"{__name__}.{name}"))
    for name in _NEWER:
        newer = importlib.import_module(f"spikingjelly.activation_based.{name}")
        _put_in_place(f"spikingjelly.clock_driven.{name}", newer)
    _package("spikingjelly.cext")
    _put_in_place("spikingjelly.cext.neuron", importlib.import_module(f"{__name__}.cext"))


require("spikingjelly", extra="spikingjelly")
if importlib.util.find_spec("spikingjelly.clock_driven") is None:
    _install()
