"""A run that is killed again and again, and one that is not: python interrupted_run.py FOLDER SEED.

The runs are forked from this process, which has everything imported and has not run any backward itself.
"""

import multiprocessing
import random
import sys
from pathlib import Path

import networks
import torch
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.checkpoint import Checkpoints

STEPS, BATCH, IMAGES = 60, 4, 20


def batch(step):
    """Every epoch in another order, which is a function of the epoch."""
    epoch, i = divmod(step, IMAGES // BATCH)
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))
    x, target = networks.images(IMAGES)
    chosen = order[i * BATCH : (i + 1) * BATCH]
    return x[chosen], target[chosen]


def train(folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = networks.conv_net()
    net.insert(2, nn.BatchNorm2d(6))
    net.insert(3, nn.Dropout(0.2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=7)
    online = sltt_ext.OnlineTrainer(
        sltt_ext.convert(net), F.cross_entropy, 4, k=2, generator=torch.Generator().manual_seed(1),
        backward=lambda loss: scaler.scale(loss).backward(),
    )  # fmt: skip
    checkpoints = Checkpoints(
        folder, net=net, optimizer=optimizer, scheduler=scheduler, scaler=scaler, online=online
    )
    for step in range(checkpoints.resume(), STEPS):
        optimizer.zero_grad()
        online.forward_backward(*batch(step))
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if step % 2 == 1:
            checkpoints.save(step + 1)
    torch.save(net.state_dict(), Path(folder) / "weights.pt")


def main(folder, seed):
    processes = multiprocessing.get_context("fork")
    moments = random.Random(seed)
    kills = 0
    while True:
        process = processes.Process(target=train, args=(folder / "killed",))
        process.start()
        process.join(timeout=moments.uniform(0.05, 1.0) if kills < 12 else None)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0, process.exitcode
    process = processes.Process(target=train, args=(folder / "whole",))
    process.start()
    process.join()
    assert process.exitcode == 0, process.exitcode
    return kills


if __name__ == "__main__":
    sys.stdout.write(str(main(Path(sys.argv[1]), int(sys.argv[2]))))
