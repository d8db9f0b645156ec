"""SpikingJelly's older neurons, `spikingjelly.clock_driven` (0.0.0.0.12), with SLTT's gradient.

They live in the installed package, and as copies in many code bases. A class is therefore recognised by what it is: its name,
the states it registers, and the numbers it computes. Nothing in here imports SpikingJelly.
"""

from sltt_ext.legacy_spikingjelly import rules  # noqa: F401  it registers its rules
from sltt_ext.legacy_spikingjelly.fused import FusedNode

__all__ = ["FusedNode"]
