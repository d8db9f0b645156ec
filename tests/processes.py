"""Several processes on the CPU, as torchrun starts them, for tests of distributed training."""

import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing


def run(world_size, cases):
    """Each case ``name: (function, arguments)`` as ``function(rank, world_size, *arguments)`` in gloo processes.

    Returns ``name: what each process returned``. Processes are started once for all the cases.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, (world_size, folder, cases), nprocs=world_size)
        parts = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]
    return {name: [part[name] for part in parts] for name in cases}


def _process(rank, world_size, folder, cases):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=2)
    )
    returned = {name: function(rank, world_size, *args) for name, (function, args) in cases.items()}
    torch.save(returned, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
