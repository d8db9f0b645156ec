import sys

import pytest
import torch

torch.set_num_threads(1)  # the suite runs in parallel processes
sys.modules.setdefault(
    "torchaudio", None
)  # SpikingJelly asks for it; its last release refuses newer torches in transformers


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
