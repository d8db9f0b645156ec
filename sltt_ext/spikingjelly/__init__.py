"""SpikingJelly's neurons with SLTT's gradient.

The explicit classes can be used to build a network, e.g.
``spiking_resnet18(spiking_neuron=SLTTLIFNode)``; `sltt_ext.convert` puts them, or an adapter made
for any other neuron, into a network that exists.
"""

from sltt_ext.optional import require

require("spikingjelly.activation_based", extra="spikingjelly")

from sltt_ext.spikingjelly import refused, sequences, step_modes, time_invariant  # noqa: E402, F401  they register their rules
from sltt_ext.spikingjelly.fused import SLTTIFNode, SLTTLIFNode, SLTTParametricLIFNode  # noqa: E402

__all__ = ["SLTTIFNode", "SLTTLIFNode", "SLTTParametricLIFNode"]
