"""One epoch of Lightning's ddp in two processes: torchrun --nproc_per_node 2 lightning_ddp_run.py FILE."""

import os
import sys

import lightning.pytorch as pl
import networks
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import sltt_ext
from sltt_ext.lightning import OnlineModule

reduced = []


def counting(state, bucket):
    reduced.append(bucket.index())
    return allreduce_hook(None, bucket)


class Count(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.strategy.model.register_comm_hook(None, counting)


if __name__ == "__main__":
    torch.set_num_threads(1)
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(networks.conv_net()), F.cross_entropy, 4)
    module = OnlineModule(online, accumulate_grad_batches=2)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False, logger=False, callbacks=[Count()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    images = TensorDataset(*networks.images(16))
    sampler = DistributedSampler(images, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(images, batch_size=2, sampler=sampler))
    if trainer.is_global_zero:
        torch.save({"weights": online.net.state_dict(), "reduced": len(reduced)}, sys.argv[1])
