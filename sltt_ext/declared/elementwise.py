"""What may be in the graph of a declared step that one loop over the elements runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sltt_ext.errors import BackendError
from sltt_ext.neuron import state_dtype

__all__ = ["CURE", "check_elementwise", "check_shapes", "divide_by_tensors"]

CURE = "backend='torch' runs the step as it is"
_ELEMENTWISE = (
    {"detach", "alias", "clone", "_to_copy", "copy_", "fill_", "lift_fresh", "lift_fresh_copy"}
    | {f"{value}_like" for value in ("zeros", "ones", "full", "empty")}
)  # fmt: skip
"""What is no arithmetic, and so not tagged as pointwise by torch."""


def check_elementwise(name: str, graph: GraphModule, reading: int) -> None:
    """See that each operator on the first ``reading`` inputs works on elements, and makes none of a shape of its own.

    Raises:
        BackendError: If one does not.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    follows = set(inputs[:reading])
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        operator = node.target
        reads = [one for one in node.all_input_nodes if one in follows]
        if reads:
            follows.add(node)
        mutable = operator._schema.is_mutable
        if mutable and _is_input(node.args[0]):
            raise _not_elementwise(name, f"it writes into what it is given ({operator})")
        plain = (
            torch.Tag.pointwise in operator.tags or operator._schema.name.partition("::")[2] in _ELEMENTWISE
        )
        if (reads and not plain) or torch.Tag.nondeterministic_seeded in operator.tags:
            raise _not_elementwise(name, f"it is not element-wise ({operator})")


def check_shapes(name: str, graph: GraphModule) -> None:
    """See that nothing is made of the shape that the input had when it was traced.

    Raises:
        BackendError: If something is.
    """
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if (
            node.op == "call_function"
            and not node.all_input_nodes
            and isinstance(value, Tensor)
            and value.numel() > 1
        ):
            raise _not_elementwise(name, f"it makes a tensor of one shape ({node.target})")


def _is_input(node: Any) -> bool:
    """Whether a node is an input, or another name for one."""
    while isinstance(node, Node) and node.target in (
        torch.ops.aten.detach.default,
        torch.ops.aten.alias.default,
    ):
        node = node.args[0]
    return isinstance(node, Node) and node.op == "placeholder"


def _not_elementwise(name: str, why: str) -> BackendError:
    return BackendError(
        f"backend='inductor' cannot run the step of {name}: {why}; write it with element-wise operators on its input, its "
        f"states and the module's tensors (torch.zeros_like(x) for zeros), or {CURE}"
    )


def divide_by_tensors(graph: GraphModule) -> None:
    """Make the numbers that are divided by tensors: torch 2.6's Inductor multiplies by what one divided by a number is."""
    for index, node in enumerate(list(graph.graph.nodes)):
        if (
            node.op == "call_function"
            and node.target is torch.ops.aten.div.Tensor
            and isinstance(node.args[1], float)
        ):
            dtype = state_dtype(node.meta["val"].dtype)
            graph.register_buffer(f"divisor{index}", torch.tensor(node.args[1], dtype=dtype))
            with graph.graph.inserting_before(node):
                divisor = graph.graph.get_attr(f"divisor{index}")
            node.args = (node.args[0], divisor)
