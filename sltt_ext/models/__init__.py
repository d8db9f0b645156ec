"""The networks of the paper's experiments, built from SpikingJelly's layers, for single and multiple steps.

Each can replace the published definition: it computes the same function with the same parameters.
`load_published_checkpoint` reads the published weights.
"""

from sltt_ext.optional import require

require("spikingjelly.activation_based", extra="spikingjelly")

from sltt_ext.models.neurons import paper_lif  # noqa: E402
from sltt_ext.models.nf_resnet import NFResNet, nf_resnet34, nf_resnet50, nf_resnet101  # noqa: E402
from sltt_ext.models.preact_resnet import PreActResNet, preact_resnet18, preact_resnet34  # noqa: E402
from sltt_ext.models.published import load_published_checkpoint  # noqa: E402
from sltt_ext.models.registry import MODELS  # noqa: E402
from sltt_ext.models.vgg import VGG, vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn  # noqa: E402

__all__ = [
    "MODELS",
    "VGG",
    "NFResNet",
    "PreActResNet",
    "load_published_checkpoint",
    "nf_resnet34",
    "nf_resnet50",
    "nf_resnet101",
    "paper_lif",
    "preact_resnet18",
    "preact_resnet34",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
]
