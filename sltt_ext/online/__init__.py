"""Online training through time: one step forward and backward, freed, then the next."""

from sltt_ext.online.losses import CrossEntropyMSELoss
from sltt_ext.online.trainer import OnlineResult, OnlineTrainer

__all__ = ["CrossEntropyMSELoss", "OnlineResult", "OnlineTrainer"]
