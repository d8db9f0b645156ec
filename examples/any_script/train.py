"""A plain image-classification script: mixup, label smoothing, EMA, clipping, accumulation, a gradient scaler.

It trains a spiking network that runs its T steps inside, with BPTT. ``--sltt`` changes one line, and trains it with SLTT.

python examples/any_script/train.py --epochs 3 --sltt
"""

import argparse

import torch
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset, random_split

import sltt_ext


class Net(nn.Module):
    """Repeats the image T times, and classifies the average over time, as published networks do."""

    def __init__(self, time_steps: int, width: int = 32) -> None:
        super().__init__()
        self.T = time_steps
        self.features = nn.Sequential(
            layer.Conv2d(1, width, 3, padding=1, bias=False),
            layer.BatchNorm2d(width),
            neuron.LIFNode(surrogate_function=surrogate.ATan()),
            layer.MaxPool2d(2),
            layer.Conv2d(width, width, 3, padding=1, bias=False),
            layer.BatchNorm2d(width),
            neuron.LIFNode(surrogate_function=surrogate.ATan()),
            layer.Flatten(),
        )
        functional.set_step_mode(self.features, "m")
        self.head = nn.Linear(16 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores ``[N, 10]`` of images ``[N, 1, 8, 8]``."""
        x_seq = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        return self.head(self.features(x_seq).mean(0))


def loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Handwritten digits of 8 x 8 pixels, 1500 to train on and 297 to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, test = random_split(data, [1500, len(data) - 1500], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(test, 297)


def mixup(x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image and its target, blended with another one of the batch."""
    share = torch.distributions.Beta(0.2, 0.2).sample().item()
    soft = F.one_hot(target, 10).float()
    return share * x + (1 - share) * x.flip(0), share * soft + (1 - share) * soft.flip(0)


def main() -> None:
    """Train, and print the accuracy after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--time-steps", type=int, default=4)
    parser.add_argument("--sltt", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = Net(args.time_steps).to(device)
    if args.sltt:
        net = sltt_ext.over_time(net, time_inside="T")  # the one line
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    scaler = torch.amp.GradScaler(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    train, test = loaders(50)
    for epoch in range(args.epochs):
        net.train()
        total = 0.0
        for i, (images, labels) in enumerate(train):
            x, target = mixup(images.to(device), labels.to(device))
            loss = criterion(net(x), target) / 2
            scaler.scale(loss).backward()
            functional.reset_net(net)
            total += 2 * loss.item() / len(train)
            if i % 2:  # gradients of two batches accumulate
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                average.update_parameters(net)
        net.eval()
        with torch.no_grad():
            right = sum((net(x.to(device)).argmax(1).cpu() == y).sum().item() for x, y in test)
            functional.reset_net(net)
        print(f"epoch {epoch}: loss {total:.3f}, accuracy {100 * right / 297:.1f} %")


if __name__ == "__main__":
    main()
