"""snnTorch's networks with SLTT's gradient.

`sltt_ext.convert` puts :class:`SLTTLeaky`, or an adapter made for any other neuron, into a network that
exists.
"""

from sltt_ext.optional import require

require("snntorch", extra="snntorch")

from sltt_ext.snntorch import refused as refused  # noqa: E402  registers the refusals
from sltt_ext.snntorch.neurons import SLTTLeaky  # noqa: E402

__all__ = ["SLTTLeaky"]
