"""Every stateful class of the installed SpikingJelly: how it is made, what one step of its input is, how it is converted.

The tables hold for both release lines; a name that the installed one lacks is left out.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from spikingjelly.activation_based import base, encoding, lava_exchange, layer, neuron, rnn, surrogate
from torch import nn

FUNCTIONAL_FORM = hasattr(base.MemoryModule, "single_step_functional_forward")  # SpikingJelly 2.x
ROOMS = (neuron, layer, rnn)
RESETS = [0.0, None, -0.3]
T = 6


@dataclass(frozen=True)
class Case:
    """A module to try: ``make()`` builds it for steps of the given shape."""

    name: str
    settings: dict[str, Any]
    room: Any = neuron
    shape: tuple[int, ...] = (4, 7)
    make_with: Callable[..., nn.Module] | None = None

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        if self.make_with is not None:
            return self.make_with()
        return getattr(self.room, self.name)(**self.settings)

    def __str__(self) -> str:
        return self.id

    @property
    def id(self) -> str:
        settings = [
            getattr(value, "__name__", type(value).__name__) if callable(value) else str(value)
            for value in self.settings.values()
        ]
        return "-".join([self.name, *settings])


def leaky_core(x: torch.Tensor, v: torch.Tensor, decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = v * decay + x
    s = surrogate.ATan()(h - 1.0)
    return s, h - s


class LIAFNode(neuron.LIAFNode):
    """0.0.0.0.14's own asks for an attribute that nothing sets, and does not make its potential a tensor."""

    single_step_cupy_fp32_inference = False

    def neuronal_charge(self, x: torch.Tensor) -> None:
        self.v_float_to_tensor(x)
        super().neuronal_charge(x)


def _installed(cases: list[Case]) -> list[Case]:
    return [case for case in cases if hasattr(case.room, case.name)]


FUSED = _installed(
    [
        *[Case("IFNode", {"v_reset": reset}) for reset in RESETS],
        *[
            Case("LIFNode", {"tau": tau, "decay_input": decay_input, "v_reset": reset})
            for tau, decay_input, reset in itertools.product([1.1, 2.0, 3.7], [True, False], RESETS)
        ],
        *[
            Case("ParametricLIFNode", {"init_tau": 1.7, "decay_input": decay_input, "v_reset": reset})
            for decay_input, reset in itertools.product([True, False], RESETS)
        ],
        Case("SLTTLIFNode", {"decay_input": False}),
        Case("SLTTLIFNode", {"tau": 1.3, "v_reset": None}),
    ]
)

GENERIC = _installed(
    [
        Case("QIFNode", {}),
        Case("EIFNode", {}),
        Case("IzhikevichNode", {"a": 0.3, "b": 0.1}),
        Case("KLIFNode", {}),
        Case("KLIFNode", {"scale_reset": True, "decay_input": False}),
        Case("LIAFNode", {}, make_with=lambda: LIAFNode(torch.tanh, threshold_related=True)),
        Case("CUBALIFNode", {}),
        Case("TernaryIFNode", {}),
        Case("TernaryLIFNode", {}),
        Case("ComplementaryLIFNode", {}),
        Case("ILIFNode", {}),
        Case("HalfThresholdIFNode", {}),
        Case("ActivationAwareIFNode", {}),
        Case("SimpleIFNode", {}),
        Case("SimpleLIFNode", {"tau": 2.0, "decay_input": True}),
        Case("MPBNLIFNode", {"out_features": 7}),
        Case("MPBNLIFNode", {"out_features": 7, "learnable_vth": True, "v_reset": None}),
        Case("OTTTLIFNode", {}),
        Case(
            "CubaLIFNode", {"current_decay": 0.4, "voltage_decay": 0.2, "requires_grad": True}, lava_exchange
        ),
        Case("RAFNode", {}),
        Case(
            "FlexSN",
            {},
            make_with=lambda: neuron.FlexSN(
                leaky_core, 1, static_inputs=(nn.Parameter(torch.tensor([0.7])),), step_mode="s"
            ),
        ),
        Case("LIFNode", {"surrogate_function": surrogate.S2NN()}),
        Case("Dropout", {"p": 0.4}, layer),
        Case("Dropout2d", {"p": 0.4}, layer, (4, 3, 5, 5)),
        Case("DropConnectLinear", {"in_features": 7, "out_features": 3}, layer),
        Case("SynapseFilter", {"tau": 3.0}, layer),
        Case("SynapseFilter", {"tau": 3.0, "learnable": True}, layer),
        Case("NeuNorm", {"in_channels": 3, "height": 5, "width": 5}, layer, (4, 3, 5, 5)),
        Case("BatchNormThroughTime1d", {"T": T, "num_features": 7}, layer),
        Case("BatchNormThroughTime2d", {"T": T, "num_features": 3}, layer, (4, 3, 5, 5)),
        Case("BatchNormThroughTime3d", {"T": T, "num_features": 2}, layer, (4, 2, 3, 3, 3)),
        Case("Delay", {"delay_steps": 2}, layer),
        Case("Delay", {"delay_steps": 0}, layer),
        Case(
            "LinearRecurrentContainer",
            {},
            layer,
            make_with=lambda: layer.LinearRecurrentContainer(
                neuron.LIFNode(surrogate_function=surrogate.S2NN()), 7, 7
            ),
        ),
        Case(
            "ElementWiseRecurrentContainer",
            {},
            layer,
            make_with=lambda: layer.ElementWiseRecurrentContainer(
                neuron.ParametricLIFNode(surrogate_function=surrogate.S2NN()), lambda x, y: x + 0.5 * y
            ),
        ),
    ]
)

SEQUENCES = _installed(  # their time loop is their own: tests of their own in test_sequences.py
    [
        Case("GatedLIFNode", {"T": T, "inplane": 3}, neuron, (4, 3, 5, 5)),
        *[Case(name, {}, layer) for name in ("MultiStepContainer", "TLastMultiStepContainer")],
        Case("StepModeContainer", {}, layer),
        *[Case(f"TemporalEffectiveBatchNorm{n}d", {"T": T}, layer) for n in (1, 2, 3)],
        *[Case(f"Spiking{kind}", {}, rnn) for kind in ("LSTM", "GRU", "VanillaRNN")],
        *[Case(f"Spiking{kind}Cell", {}, rnn) for kind in ("LSTM", "GRU", "VanillaRNN")],
    ]
)

REFUSED = _installed(
    [
        Case("PSN", {"T": 4}),
        Case("MaskedPSN", {"k": 2, "T": 4}),
        Case("SlidingPSN", {"k": 2}),
        Case("DSRIFNode", {}),
        Case("DSRLIFNode", {}),
        Case("NonSpikingIFNode", {}),
        Case("NonSpikingLIFNode", {}),
        Case("ILCIFNode", {"act_dim": 2, "dec_pop_dim": 3}),
        Case("ILCLIFNode", {"act_dim": 2, "dec_pop_dim": 3}),
        Case("ILCCUBALIFNode", {"act_dim": 2, "dec_pop_dim": 3}),
        Case("NoisyCUBALIFNode", {"num_node": 3}),
        Case("NoisyILCCUBALIFNode", {"act_dim": 2, "dec_pop_dim": 3}),
        Case("NoisyNonSpikingIFNode", {"num_node": 3}),
        Case("STBIFNode", {"q_threshold": 0.3, "level": 8}),
        Case("DropConnectLinear", {"in_features": 7, "out_features": 3, "invariant": True}, layer),
    ]
)
if FUNCTIONAL_FORM:  # in 0.0.0.0.14 these are no torch modules, and no network can hold them
    REFUSED += [
        Case("TemporalWiseAttention", {"T": 4, "reduction": 2}, layer),
        Case("MultiDimensionalAttention", {"T": 4, "C": 4, "reduction_t": 2, "reduction_c": 2}, layer),
    ]

STATELESS = {  # take sequences, and treat their steps alike
    "SeqToANNContainer",
    "TLastSeqToANNContainer",
    "SpikeCountToBinary",
    "TemporalBinSum",
    *[f"ThresholdDependentBatchNorm{n}d" for n in (1, 2, 3)],
}

FRAMES = {  # to derive from: they compute nothing themselves
    "AdaptBaseNode",
    "BaseNode",
    "ILCBaseNode",
    "MPBNBaseNode",
    "NoisyBaseNode",
    "NoisyILCBaseNode",
    "NoisyNonSpikingBaseNode",
    "NonSpikingBaseNode",
    "SimpleBaseNode",
    "SpikingRNNBase",
    "SpikingRNNCellBase",
}

ENCODERS = [  # each with what its first step is given; the steps after it need nothing
    (encoding.PeriodicEncoder(torch.eye(2)), torch.eye(2)),
    (encoding.LatencyEncoder(4), torch.rand(2)),
    (encoding.WeightedPhaseEncoder(4), 0.9 * torch.rand(2)),
]
