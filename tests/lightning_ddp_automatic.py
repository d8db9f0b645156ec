"""An ordinary LightningModule in ddp, in two processes: torchrun --nproc_per_node 2 lightning_ddp_automatic.py FILE."""

import os
import sys

import lightning.pytorch as pl
import networks
import torch
from lightning_ddp_run import Count, reduced
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import sltt_ext


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = sltt_ext.over_time(networks.conv_net(), 4)

    def training_step(self, batch, batch_idx):
        x, target = batch
        return F.cross_entropy(self.net(x), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    module = Module()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False, logger=False, callbacks=[Count()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
        gradient_clip_val=0.5,
    )  # fmt: skip
    images = TensorDataset(*networks.images(16))
    sampler = DistributedSampler(images, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(images, batch_size=2, sampler=sampler))
    if trainer.is_global_zero:
        torch.save({"weights": module.net.state_dict(), "reduced": len(reduced)}, sys.argv[1])
