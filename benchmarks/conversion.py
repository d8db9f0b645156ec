"""How long convert and revert take for a spiking ResNet-101.

python benchmarks/conversion.py
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

from measure import write_results
from spikingjelly.activation_based import neuron, surrogate
from spikingjelly.activation_based.model.spiking_resnet import spiking_resnet101

import sltt_ext

REPEATS = 21


def milliseconds(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    net = spiking_resnet101(spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan())
    sltt_ext.revert(sltt_ext.convert(net))  # loads the adapters
    times = [
        (milliseconds(sltt_ext.convert, net), milliseconds(sltt_ext.revert, net)) for _ in range(REPEATS)
    ]
    rows = [
        {
            "network": "spiking_resnet101",
            "modules": sum(1 for _ in net.modules()),
            "neurons": sum(isinstance(module, neuron.LIFNode) for module in net.modules()),
            "operation": operation,
            "median_ms": round(statistics.median(values), 2),
            "slowest_ms": round(max(values), 2),
        }
        for operation, values in zip(("convert", "revert"), zip(*times))
    ]
    write_results("conversion", rows)


if __name__ == "__main__":
    main()
