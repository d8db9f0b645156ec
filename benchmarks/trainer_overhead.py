"""How much longer the trainer takes than a loop of the same steps written by hand.

python benchmarks/trainer_overhead.py
"""

import statistics
import time
from collections.abc import Callable

import torch
from measure import write_results
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model.spiking_resnet import spiking_resnet18
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.demo.training import network

T = 6
ROUNDS = 41


def by_hand(net: nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
    functional.reset_net(net)
    total, mean = torch.zeros(()), torch.zeros(())
    for _ in range(T):
        output = net(x)
        loss = F.cross_entropy(output, target) / T
        loss.backward()
        total, mean = total + loss.detach(), mean + output.detach() / T
        functional.detach_net(net)


def compare(name: str, net: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, object]:
    """Both take turns, also in going first. The ratio is the median over the ratios of the rounds."""
    sltt_ext.convert(net)
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T)
    contenders: list[Callable[[], object]] = [
        lambda: by_hand(net, x, target),
        lambda: online.forward_backward(x, target),
    ]
    seconds: list[list[float]] = []
    for round_number in range(ROUNDS + 3):
        row = [0.0, 0.0]
        for which in (0, 1) if round_number % 2 else (1, 0):
            net.zero_grad()
            start = time.process_time()
            contenders[which]()
            row[which] = time.process_time() - start
        seconds.append(row)
    rounds = seconds[3:]
    ratios = sorted(trainer / loop for loop, trainer in rounds)
    return {
        "network": name,
        "loop_cpu_ms": round(1000 * statistics.median(loop for loop, _ in rounds), 2),
        "trainer_cpu_ms": round(1000 * statistics.median(trainer for _, trainer in rounds), 2),
        "median_ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": f"{ratios[ROUNDS // 4]:.4f}-{ratios[3 * ROUNDS // 4]:.4f}",
        "time_steps": T,
        "rounds": ROUNDS,
    }


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    resnet = spiking_resnet18(
        spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(), num_classes=10
    )
    write_results(
        "trainer_overhead",
        [
            compare("digits, batch 64", network(32), torch.rand(64, 1, 8, 8), torch.randint(0, 10, (64,))),
            compare(
                "spiking_resnet18, 2 images of 64 px",
                resnet,
                torch.randn(2, 3, 64, 64),
                torch.randint(0, 10, (2,)),
            ),
        ],
    )


if __name__ == "__main__":
    main()
