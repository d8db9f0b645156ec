"""snnTorch's networks with SLTT's gradient."""

from sltt_ext.optional import require

require("snntorch", extra="snntorch")
