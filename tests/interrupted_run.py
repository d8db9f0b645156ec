"""A run that is killed again and again, and one that is not: python interrupted_run.py FOLDER SEED.

The runs are forked from this process, which has everything imported and has not run any backward itself.
"""

import multiprocessing
import random
import shutil
import sys
import time
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
    torch.use_deterministic_algorithms(True)  # seconds decide over no plan
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
    """Returns how many times the killed run was killed: once or more."""
    start = time.perf_counter()
    assert run(folder / "whole").exitcode == 0
    longest, moments, kills = time.perf_counter() - start, random.Random(seed), 0
    while not kills:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        kills = run_and_kill(folder / "killed", lambda: moments.uniform(0.02, 0.5) * longest)  # noqa: B023
        longest /= 2  # it was done before the first moment: faster than the whole run
    return kills


def run(folder, seconds=None):
    """The process of a run, after it has ended or the time is over."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder,))
    process.start()
    process.join(seconds)
    return process


def run_and_kill(folder, moment):
    kills = 0
    while kills < 12:
        process = run(folder, moment())
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    else:
        process = run(folder)
    assert process.exitcode == 0, process.exitcode
    return kills


if __name__ == "__main__":
    sys.stdout.write(str(main(Path(sys.argv[1]), int(sys.argv[2]))))
