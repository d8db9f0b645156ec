"""One run of the paper's experiments, from a configuration file and a command line."""

from sltt_ext.experiment.parts import named_network
from sltt_ext.experiment.settings import Experiment
from sltt_ext.experiment.training import main, run

__all__ = ["Experiment", "main", "named_network", "run"]
