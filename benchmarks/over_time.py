"""A network over time as one module (`over_time`) against `OnlineTrainer`, and its memory over T.

python benchmarks/over_time.py
"""

import statistics
import time
from collections.abc import Callable

import torch
from measure import write_results
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.models import nf_resnet34

T = 6
ROUNDS = 11
SETTINGS = {
    "SLTT": {},
    "SLTT-1": {"k": 1},
    "SLTT, room for all graphs": {"memory_budget": 2**40},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nf_resnet34(num_classes=10)


def times() -> list[dict[str, object]]:
    """The time of each pair, which takes turns. The ratio is the median over the ratios of the rounds."""
    x, target = torch.randn(8, 3, 96, 96), torch.randint(0, 10, (8,))
    rows: list[dict[str, object]] = []
    for name, options in SETTINGS.items():
        k = options.get("k")
        trained, module = sltt_ext.convert(network()), sltt_ext.over_time(network(), T, **options)
        online = sltt_ext.OnlineTrainer(trained, F.cross_entropy, T, k=k)

        def over_time(module: nn.Module = module) -> None:
            module.zero_grad()
            F.cross_entropy(module(x), target).backward()

        def trainer(net: nn.Module = trained, online: sltt_ext.OnlineTrainer = online) -> None:
            net.zero_grad()
            online.forward_backward(x, target)

        contenders: list[Callable[[], None]] = [trainer, over_time]
        rounds = []
        for number in range(ROUNDS + 2):
            row = [0.0, 0.0]
            for which in (0, 1) if number % 2 else (1, 0):
                start = time.perf_counter()
                contenders[which]()
                row[which] = time.perf_counter() - start
            rounds.append(row)
        ratios = sorted(b / a for a, b in rounds[2:])
        rows.append(
            {
                "network": "nf_resnet34, 8 images of 96 px, T=6",
                "method": name,
                "trainer_seconds": round(statistics.median(a for a, _ in rounds[2:]), 3),
                "over_time_seconds": round(statistics.median(b for _, b in rounds[2:]), 3),
                "median_ratio": round(statistics.median(ratios), 3),
                "ratio_quartiles": f"{ratios[ROUNDS // 4]:.3f}-{ratios[3 * ROUNDS // 4]:.3f}",
                "rounds": ROUNDS,
            }
        )
    return rows


def memory() -> list[dict[str, object]]:
    """Peak activation memory of one iteration."""
    x, target = torch.randn(8, 3, 96, 96), torch.randint(0, 10, (8,))
    rows: list[dict[str, object]] = []
    for time_steps in (1, 2, 6, 32):
        net = sltt_ext.over_time(network(), time_steps)

        def iteration(net: nn.Module = net) -> None:
            net.zero_grad()
            F.cross_entropy(net(x), target).backward()

        iteration()
        peak = peak_activation_bytes(iteration, net)
        rows.append(
            {
                "network": "nf_resnet34, 8 images of 96 px",
                "time_steps": time_steps,
                "peak_mib": round(peak / 2**20, 1),
            }
        )
    return rows


def main() -> None:
    torch.set_num_threads(2)
    write_results("over_time", times())
    write_results("over_time_memory", memory())


if __name__ == "__main__":
    main()
