"""Online training through time: each step runs forward and backward, and is freed before the next."""

from sltt_ext.online.losses import CrossEntropyMSELoss
from sltt_ext.online.trainer import OnlineResult, OnlineTrainer

__all__ = ["CrossEntropyMSELoss", "OnlineResult", "OnlineTrainer"]
