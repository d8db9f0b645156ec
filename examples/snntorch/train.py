"""The networks of snnTorch's tutorials 5 and 6, before and after SLTT, on scikit-learn's handwritten digits.

python examples/snntorch/train.py                                      fully connected, rate-coded
python examples/snntorch/train.py --code latency                       the same, latency-coded
python examples/snntorch/train.py --network conv                       convolutional, rate-coded

Prints a table of test accuracy, seconds per epoch and peak activation memory for BPTT as the tutorials
have it, for SLTT step by step, for SLTT-K, and for SLTT on whole sequences.
"""

import argparse
import time

import snntorch
import torch
from snntorch import functional as SF
from snntorch import spikegen, surrogate, utils
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.data import load_digits
from sltt_ext.snntorch import MultiStep, step_loss

LEARNING_RATES = {"fc": 1e-3, "conv": 1e-2}


def network(name: str) -> nn.Module:
    """[N, 1, 28, 28] -> spikes and membrane potentials [N, 10]."""
    torch.manual_seed(0)
    if name == "fc":
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(28 * 28, 1000),
            snntorch.Leaky(beta=0.95, init_hidden=True),
            nn.Linear(1000, 10),
            snntorch.Leaky(beta=0.95, init_hidden=True, output=True),
        )
    leaky = {"beta": 0.5, "spike_grad": surrogate.fast_sigmoid(slope=25), "init_hidden": True}
    return nn.Sequential(
        nn.Conv2d(1, 12, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(**leaky),
        nn.Conv2d(12, 64, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(**leaky),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
        snntorch.Leaky(**leaky, output=True),
    )


def spikes(images: torch.Tensor, code: str, time_steps: int) -> torch.Tensor:
    """Images [N, 1, 28, 28] as spikes [T, N, 1, 28, 28]."""
    if code == "rate":
        return spikegen.rate(images, num_steps=time_steps)
    return spikegen.latency(images, num_steps=time_steps, tau=5, threshold=0.01, normalize=True, clip=True)


def main() -> None:
    """Train with each method and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=["fc", "conv"], default="fc")
    parser.add_argument("--code", choices=["rate", "latency"], default="rate")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--time-steps", type=int, default=25, metavar="T")
    options = parser.parse_args()
    time_steps = options.time_steps

    digits = load_digits()
    train, test = (
        F.interpolate(x, size=28, mode="bilinear") for x in (digits.train_images, digits.test_images)
    )
    loss_fn = SF.ce_rate_loss()

    def bptt(net: nn.Module, x_seq: torch.Tensor, target: torch.Tensor) -> None:
        utils.reset(net)
        loss_fn(torch.stack([net(x)[0] for x in x_seq]), target).backward()

    def sltt(
        net: nn.Module, x_seq: torch.Tensor, target: torch.Tensor, k: int | None = None, chunk: int = 1
    ) -> None:
        online = sltt_ext.OnlineTrainer(net, step_loss(loss_fn), time_steps, k=k, chunk=chunk, time_dim=0)
        online.forward_backward(x_seq, target)

    methods = {
        "BPTT, snnTorch": (lambda net: net, bptt),
        "SLTT": (sltt_ext.convert, sltt),
        "SLTT-5": (sltt_ext.convert, lambda net, x, y: sltt(net, x, y, k=min(5, time_steps))),
        "SLTT, MultiStep": (
            lambda net: MultiStep(sltt_ext.convert(net)),
            lambda net, x, y: sltt(net, x, y, chunk=time_steps),
        ),
    }
    print("| method | test accuracy | seconds per epoch | peak activation MB |\n| --- | --- | --- | --- |")
    for name, (prepare, run) in methods.items():
        net = network(options.network)
        trained = prepare(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATES[options.network])
        loader = DataLoader(TensorDataset(train, digits.train_labels), batch_size=64, shuffle=True)
        start = time.perf_counter()
        for _ in range(options.epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                run(trained, spikes(images, options.code, time_steps), labels)
                optimizer.step()
        seconds = (time.perf_counter() - start) / options.epochs
        x_seq = spikes(train[:64], options.code, time_steps)
        peak = peak_activation_bytes(lambda: run(trained, x_seq, digits.train_labels[:64]), net)  # noqa: B023
        utils.reset(net)
        with torch.no_grad():
            recording = torch.stack([net(x)[0] for x in spikes(test, options.code, time_steps)])
        accuracy = SF.accuracy_rate(recording, digits.test_labels)
        print(f"| {name} | {accuracy:.1%} | {seconds:.2f} | {peak / 1e6:.1f} |")


if __name__ == "__main__":
    main()
