"""SpikingJelly's neurons with SLTT's gradient.

The explicit classes can be used to build a network, e.g.
``spiking_resnet18(spiking_neuron=SLTTLIFNode)``; `sltt_ext.convert` puts them, or an adapter made
for any other neuron, into a network that exists.
"""

from sltt_ext.errors import MissingDependencyError

try:
    import spikingjelly.activation_based as _framework
except ImportError as error:
    raise MissingDependencyError(
        "sltt_ext.spikingjelly needs SpikingJelly: pip install 'sltt-ext[spikingjelly]'"
    ) from error

from sltt_ext.spikingjelly import refused as _refused
from sltt_ext.spikingjelly.neurons import SLTTIFNode, SLTTLIFNode, SLTTParametricLIFNode

__all__ = ["SLTTIFNode", "SLTTLIFNode", "SLTTParametricLIFNode"]

del _framework, _refused
