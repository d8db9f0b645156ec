"""A network as a chain of blocks, each of which reads only the one tensor that the block before it returns.

The network's forward is traced (``torch.fx``), down to modules without submodules, to neurons, and to what cannot be traced.
If the forward of a module looks at numbers, draws or leaves something behind, the module is one node, and runs as it is. All
modules are called as modules, so that hooks in the network see the same calls. Every value through which all data flows may
then be a border between two blocks: the output of a residual block, for example, but nothing inside it.

Python code between the modules runs when the network is traced. It is traced anew in every iteration.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from sltt_ext.errors import ConfigurationError, one_line
from sltt_ext.forwards import has_hooks, has_own_forward
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.attributes import ABSENT, is_same, plain_attributes, put
from sltt_ext.online.snapshot import drawn, random_numbers

__all__ = ["Block", "Chain", "module_of"]

_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.setitem,
}  # fmt: skip


class Chain:
    """The nodes of a network in order, and the values among them through which all data flows.

    Args:
        net: The network, which takes one input.

    Attributes:
        entry: The input.
        nodes: What is computed, in order.
        points: Where a border may be.

    Raises:
        ConfigurationError: If there is no such value, with the reason.
    """

    def __init__(self, net: nn.Module) -> None:
        tracer = _Tracer()
        tracer.trace_network(net)
        self._reaches = tracer.reaches
        nodes = [node for node in tracer.graph.nodes if node.op != "get_attr"]
        self.entry, *self.nodes, output = nodes
        self._output: fx.Node = output.args[0]
        self.points = list(self._flows_through()) if isinstance(self._output, fx.Node) else []
        if not self.points:
            reasons = "; ".join(f"{path or 'forward'}: {reason}" for path, reason in tracer.reasons.items())
            why = f" ({reasons})" if reasons else ""
            raise ConfigurationError(
                f"blocks= finds no place in {type(net).__name__} where all data flows through one tensor{why}: leave blocks= out, "
                "or write the network as a chain, such as a torch.nn.Sequential of its blocks"
            )

    def _flows_through(self) -> Iterator[fx.Node]:
        """The values after which nothing else of before is read."""
        place = {node: i for i, node in enumerate([self.entry, *self.nodes])}
        # what a module keeps at one place flows to the others
        last: dict[Any, int] = {
            module: place[node]
            for node in self.nodes
            if (module := module_of(node)) is not None and _keeps(module)
        }
        furthest = max((place.get(user, len(place)) for user in self.entry.users), default=0)
        for node in self.nodes:
            furthest = max(furthest, last.get(module_of(node), 0))
            changed = any(_writes_to(user, node) for user in node.users)
            if furthest <= place[node] and node is not self._output and node.users and not changed:
                yield node
            furthest = max(furthest, *(place.get(user, len(place)) for user in node.users), 0)

    def borders_around(self, modules: Sequence[nn.Module], net: nn.Module) -> list[fx.Node]:
        """The borders before and after modules that a user has named.

        Raises:
            ConfigurationError: If a module is not in the network, runs not once, or data flows past its input or output.
        """
        paths = {module: path for path, module in net.named_modules()}
        found: list[fx.Node] = []
        for module in modules:
            if module not in paths:
                raise ConfigurationError(
                    f"blocks= names a {type(module).__name__} that is not a module of the network"
                )
            reached = self._reaches.get(module, [])
            if len(reached) != 1:
                times = (
                    f"runs {len(reached)} times"
                    if reached
                    else "does not run, or is inside of what cannot be traced"
                )
                raise ConfigurationError(
                    f"blocks= names {paths[module]!r}, which {times}: name modules that run once"
                )
            for node in reached[0]:
                if node not in (self.entry, self._output) and node not in self.points:
                    raise ConfigurationError(
                        f"blocks= names {paths[module]!r}, but data (or the state of a module that runs twice) "
                        f"flows past {node.name!r}, a value at its border: name modules that all data flows through, such as whole "
                        "residual blocks"
                    )
                if node in self.points:
                    found.append(node)
        return [node for node in self.points if node in set(found)]

    def blocks(self, borders: Sequence[fx.Node]) -> list[Block]:
        """The blocks between these borders."""
        blocks, entry, waiting = [], self.entry, list(self.nodes)
        for border in (*borders, self._output):
            until = waiting.index(border) + 1
            blocks.append(Block(waiting[:until], entry, border))
            entry, waiting = border, waiting[until:]
        return blocks


class Block(nn.Module):
    """Some consecutive nodes of a network as a module that holds the network's own ones.

    Args:
        nodes: The nodes in order.
        entry: The value that they read.
        exit: The one that they give.
    """

    def __init__(self, nodes: Sequence[fx.Node], entry: fx.Node, exit: fx.Node) -> None:
        super().__init__()
        self.entry, self.exit = entry, exit
        last: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        self.nodes = [(node, [one for one in node.all_input_nodes if last[one] is node]) for node in nodes]
        self.seen: Callable[[fx.Node, Callable[[], Any]], Any] = lambda node, run: run()
        for node in nodes:
            module = module_of(node)
            if module is not None:
                self._modules[node.meta["path"]] = module  # by its path in the network, which has dots
            for given in node.all_input_nodes:
                if given.op == "get_attr":
                    held = given.meta["tensor"]
                    (self._parameters if isinstance(held, nn.Parameter) else self._buffers)[
                        str(given.target)
                    ] = held

    def forward(self, x: Any) -> Any:
        """The value at the exit, of that at the entry."""
        values = {self.entry: x}
        del x
        for node, dropped in self.nodes:
            values[node] = self.seen(node, lambda node=node: _run(node, values))  # type: ignore[misc]
            for one in dropped:
                values.pop(one, None)
        return values[self.exit]


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that a node calls, if it calls one."""
    return node.meta["module"] if node.op == "call_module" else None


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def value(given: fx.Node) -> Any:
        return given.meta["tensor"] if given.op == "get_attr" else values[given]

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    if node.op == "call_module":
        return node.meta["module"](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _keeps(module: nn.Module) -> bool:
    """Whether a module, or one in it, keeps something from call to call."""
    return any(isinstance(one, StatefulModule) or one._buffers for one in module.modules())


def _writes_to(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node changes a value that it reads in place."""
    if user.op == "call_module":
        return bool(getattr(module_of(user), "inplace", False))
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    in_place = user.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place or bool(user.kwargs.get("inplace", False)) or "out" in user.kwargs


class _NotTracedError(Exception):
    """What a forward does that no graph has."""


class _Called(nn.Module):
    """Calls a network as the time loop does, with its input alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Any:
        return self.net(x)


class _Tracer(fx.Tracer):
    """Traces through modules that hold others, as far as these are nothing but what they call.

    Attributes:
        reasons: Path -> why a module is one node.
        reaches: The values that a module that was traced has got and given, for each time it ran.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}
        self.reaches: dict[nn.Module, list[tuple[fx.Node, fx.Node]]] = {}

    def trace_network(self, net: nn.Module) -> None:
        """Trace a network; an autograd function of its own would be traced through, without its backward."""
        apply = inspect.getattr_static(torch.autograd.Function, "apply")
        try:
            torch.autograd.Function.apply = classmethod(partial(_apply, apply))  # type: ignore[assignment, arg-type]
            self.trace(_Called(net))
        finally:
            torch.autograd.Function.apply = apply  # type: ignore[method-assign]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if (
            has_hooks(m)
            or has_own_forward(m)
            or isinstance(m, StatefulModule)
            or not any(True for _ in m.children())
        ):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        name = path.removeprefix("net").removeprefix(".")
        found = ABSENT
        if not self.is_leaf_module(m, path):
            before = next(iter(reversed(self.graph.nodes)))
            try:
                found = self._through(m, forward, args, kwargs)
            except Exception as error:  # whatever a forward does with what has no numbers
                self.reasons[name] = one_line(error, 200)
                while (node := next(iter(reversed(self.graph.nodes)))) is not before:
                    self.graph.erase_node(node)
        elif isinstance(m, StatefulModule) and any(
            isinstance(child, StatefulModule) for child in [*m.modules()][1:]
        ):
            self.reasons[name] = f"a {type(m).__name__} runs the steps of what is in it by itself"
        if found is ABSENT:
            found = self.create_proxy("call_module", path, args, kwargs)
            found.node.meta.update(module=m, path=name)
        given = [arg.node for arg in args if isinstance(arg, fx.Proxy)]
        if given and isinstance(found, fx.Proxy):
            self.reaches.setdefault(m, []).append((given[0], found.node))
        return found

    def _through(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before, generators, draw_again = dict(plain_attributes(m)), drawn(m), random_numbers(m)
        try:
            found = forward(*args, **kwargs)
        finally:
            draws = drawn(m) != generators
            if draws:
                draw_again()
            after = dict(plain_attributes(m))
            left = [
                key
                for key in before.keys() | after.keys()
                if not is_same(before.get(key, ABSENT), after.get(key, ABSENT))
            ]
            for key in left:
                put(key, before.get(key, ABSENT))
        if left:
            raise _NotTracedError(f"its forward sets {left[0][1][0]!r}")
        if draws:
            raise _NotTracedError("its forward draws random numbers")
        return found

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            raise _NotTracedError("its forward makes a tensor")
        return super().create_arg(a)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **named: Any
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *others, **named)
        if kind == "get_attr":
            *path, name = str(target).split(".")
            node.meta["tensor"] = getattr(self.root.get_submodule(".".join(path)), name)
        return node


def _apply(apply: Any, cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(arg, fx.Proxy) for arg in (*args, *kwargs.values())):
        raise _NotTracedError(f"its forward calls the autograd function {cls.__name__}")
    return apply.__get__(None, cls)(*args, **kwargs)
