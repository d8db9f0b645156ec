"""A run of Lightning's ddp that is resumed, and one that is not: torchrun --nproc_per_node 2 lightning_ddp_resume.py FOLDER."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import networks
import torch
from spikingjelly.activation_based import layer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sltt_ext
from sltt_ext.lightning import OnlineModule


def run(epochs, checkpoint, *, seed, resume=False):
    """Weights of a run whose processes draw dropout of their own."""
    torch.use_deterministic_algorithms(True)  # seconds decide over no plan
    net = networks.conv_net()
    net.insert(2, layer.Dropout(0.3))
    torch.manual_seed(seed + int(os.environ["RANK"]))
    module = OnlineModule(sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, 3, k=2))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    images = DataLoader(TensorDataset(*networks.images(16)), batch_size=2, shuffle=True)
    trainer.fit(module, images, ckpt_path=checkpoint if resume else None)
    trainer.save_checkpoint(checkpoint)
    return net.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    whole = run(3, folder / "whole.ckpt", seed=0)
    run(1, folder / "broken.ckpt", seed=0)
    resumed = run(3, folder / "broken.ckpt", seed=5, resume=True)
    if os.environ["RANK"] == "0":
        torch.save({"whole": whole, "resumed": resumed}, folder / "result.pt")
