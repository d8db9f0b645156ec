"""snnTorch's neurons with their settings, and neurons of a user's own."""

import itertools

import snntorch
import torch
from snntorch import surrogate
from snntorch.functional import quant
from torch import nn


class RenamedLeaky(snntorch.Leaky):
    """A subclass that only sets defaults."""

    def __init__(self, **kwargs):
        super().__init__(beta=0.7, threshold=0.8, reset_mechanism="zero", **kwargs)


class NoisyLeaky(snntorch.Leaky):
    """A subclass that wraps the step."""

    def forward(self, input_, mem=None):
        return super().forward(1.1 * input_, mem)


class QuadraticLeaky(snntorch.Leaky):
    """A subclass that changes how the neuron charges."""

    def _base_state_function(self, input_):
        return super()._base_state_function(input_) + 0.1 * self.mem**2


class Adaptive(snntorch.SpikingNeuron):
    """A user's own neuron: a buffer and a plain attribute as state, two learned parameters."""

    def __init__(self, init_hidden=True):
        super().__init__(init_hidden=init_hidden)
        self.decay = nn.Parameter(torch.tensor(0.8))
        self.strength = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("mem", torch.zeros(0), persistent=False)
        self.state = (None, 0)

    def reset_mem(self):
        self.mem, self.state = torch.zeros(0), (None, 0)

    def forward(self, input_, mem=None):
        if mem is not None:
            self.mem = mem
        if self.mem.shape != input_.shape:
            self.mem = torch.zeros_like(input_)
        adaptation, t = self.state
        adaptation = torch.zeros_like(input_) if adaptation is None else adaptation
        self.mem = self.decay * self.mem + input_ - self.strength * adaptation
        spk = self.fire(self.mem)
        self.state = (0.9 * adaptation + self.mem, t + 1)
        return spk if self.init_hidden else (spk, self.mem)


DENSE, IMAGE = (4, 6), (3, 2, 5, 5)
RESETS = ["subtract", "zero", "none"]
LEAKY = [
    {"beta": 0.9},
    {"beta": 1.7, "threshold": 0.4},
    {"beta": torch.rand(6, generator=torch.Generator().manual_seed(0)), "learn_beta": True},
    {"beta": 0.8, "threshold": torch.linspace(0.2, 1.2, 6), "learn_threshold": True},
    {"beta": torch.tensor([0.8]), "threshold": torch.tensor([0.5]), "learn_beta": True, "learn_threshold": True},
    {"beta": 0.8, "graded_spikes_factor": 0.7, "learn_graded_spikes_factor": True},
    {"beta": 0.8, "graded_spikes_factor": torch.linspace(0.5, 1.5, 6)},
    {"beta": 0.8, "spike_grad": surrogate.fast_sigmoid(slope=5), "threshold": 1},
]  # fmt: skip
FUSED = [
    *[
        (snntorch.Leaky, {**kwargs, "reset_mechanism": reset, "reset_delay": delay}, DENSE)
        for kwargs, reset, delay in itertools.product(LEAKY, RESETS, [True, False])
    ],
    (snntorch.Leaky, {"beta": torch.rand(2, 1, 1), "learn_beta": True}, IMAGE),
    (RenamedLeaky, {}, DENSE),
]
GENERIC = [
    (snntorch.Leaky, {"beta": 0.8, "inhibition": True}, DENSE),
    (snntorch.Leaky, {"beta": 0.8, "state_quant": quant.state_quant(num_bits=4)}, DENSE),
    (snntorch.Leaky, {"beta": 0.8, "surrogate_disable": True}, DENSE),
    (snntorch.Leaky, {"beta": 0.8, "spike_grad": surrogate.custom_surrogate(lambda u, g, s: g / (1 + u * u))}, DENSE),
    (NoisyLeaky, {"beta": 0.8, "learn_beta": True}, DENSE),
    (QuadraticLeaky, {"beta": 0.8, "learn_beta": True}, DENSE),
    *[
        (snntorch.Synaptic, {"alpha": 0.7, "beta": 0.6, "reset_mechanism": reset, "reset_delay": delay, **learn}, DENSE)
        for reset, delay, learn in itertools.product(
            RESETS, [True, False], [{}, {"learn_alpha": True, "learn_beta": True, "learn_threshold": True}]
        )
    ],
    (snntorch.Synaptic, {"alpha": 0.7, "beta": 0.6, "state_quant": quant.state_quant(num_bits=4)}, DENSE),
    *[
        (snntorch.Alpha, {"alpha": 0.8, "beta": 0.6, "reset_mechanism": reset, "learn_beta": True}, DENSE)
        for reset in RESETS
    ],
    *[(snntorch.Lapicque, {"beta": 0.8, "reset_mechanism": reset}, DENSE) for reset in RESETS],
    (snntorch.Lapicque, {"R": 5.0, "C": 0.8, "learn_threshold": True}, DENSE),
    *[
        (snntorch.RLeaky, {"beta": 0.7, "reset_mechanism": reset, "reset_delay": delay, **recurrent}, shape)
        for reset, delay, (recurrent, shape) in itertools.product(
            RESETS,
            [True, False],
            [
                ({"linear_features": 6}, DENSE),
                ({"conv2d_channels": 2, "kernel_size": 3, "learn_beta": True}, IMAGE),
                ({"all_to_all": False, "V": torch.linspace(-0.5, 1, 6), "learn_threshold": True}, DENSE),
            ],
        )
    ],
    (snntorch.RLeaky, {"beta": 0.7, "linear_features": 6, "learn_recurrent": False}, DENSE),
    (snntorch.RLeaky, {"beta": 0.7, "linear_features": 6, "inhibition": True}, DENSE),
    *[
        (snntorch.RSynaptic, {"alpha": 0.6, "beta": 0.7, "reset_mechanism": reset, **recurrent}, shape)
        for reset, (recurrent, shape) in itertools.product(
            RESETS,
            [
                ({"linear_features": 6, "learn_alpha": True}, DENSE),
                ({"conv2d_channels": 2, "kernel_size": 3}, IMAGE),
                ({"all_to_all": False, "V": 0.6}, DENSE),
            ],
        )
    ],
    *[
        (snntorch.SLSTM, {"input_size": 6, "hidden_size": 6, "threshold": 0.05, "reset_mechanism": reset}, DENSE)
        for reset in RESETS
    ],
    (snntorch.SLSTM, {"input_size": 6, "hidden_size": 3, "threshold": 0.05}, DENSE),
    *[
        (snntorch.SConv2dLSTM, {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "threshold": 0.05, **pool}, IMAGE)
        for pool in [{}, {"max_pool": 2}, {"avg_pool": 2}, {"reset_mechanism": "subtract"}, {"reset_mechanism": "zero"}]
    ],
    (Adaptive, {}, DENSE),
]  # fmt: skip
if hasattr(snntorch, "DeltaLeaky"):
    GENERIC.append((snntorch.DeltaLeaky, {"beta": 0.8, "delta_threshold": 0.5, "learn_beta": True}, DENSE))
CASES = FUSED + GENERIC


def ids(cases):
    return [
        "-".join([cls.__name__, *[f"{k}={v}" for k, v in kwargs.items() if isinstance(v, (int, float, str))]])
        for cls, kwargs, _ in cases
    ]
