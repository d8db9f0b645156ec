"""A code base's own copy of the old neurons: the interface of spikingjelly.clock_driven, written anew in one file."""

import copy
import math

import torch
from torch import nn


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, slope):
        ctx.save_for_backward(slope)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


class _Surrogate(nn.Module):
    def __init__(self, alpha, spiking=True):
        super().__init__()
        self.alpha, self.spiking = alpha, spiking

    def forward(self, u):
        if not self.spiking:
            return self.smooth(u)
        return _Spike.apply(u, self.slope(u.detach()))


class Sigmoid(_Surrogate):
    def __init__(self, alpha=4.0, spiking=True):
        super().__init__(alpha, spiking)

    def smooth(self, u):
        return (self.alpha * u).sigmoid()

    def slope(self, u):
        s = self.smooth(u)
        return s * (1 - s) * self.alpha


class ATan(_Surrogate):
    def __init__(self, alpha=2.0, spiking=True):
        super().__init__(alpha, spiking)

    def smooth(self, u):
        return (math.pi / 2 * self.alpha * u).atan() / math.pi + 0.5

    def slope(self, u):
        return self.alpha / 2 / (1 + (math.pi / 2 * self.alpha * u).square())


class MemoryModule(nn.Module):
    def __init__(self):
        super().__init__()
        self._memories, self._memories_rv = {}, {}

    def register_memory(self, name, value):
        self._memories[name] = value
        self._memories_rv[name] = copy.deepcopy(value)

    def reset(self):
        self._memories.update(copy.deepcopy(self._memories_rv))

    def __getattr__(self, name):
        memories = self.__dict__.get("_memories", {})
        return memories[name] if name in memories else super().__getattr__(name)

    def __setattr__(self, name, value):
        if name in self.__dict__.get("_memories", ()):
            self._memories[name] = value
        else:
            super().__setattr__(name, value)


class BaseNode(MemoryModule):
    def __init__(self, v_threshold=1.0, v_reset=0.0, surrogate_function=None, detach_reset=False):
        super().__init__()
        self.register_memory("v", 0.0 if v_reset is None else v_reset)
        self.register_memory("v_threshold", v_threshold)
        self.register_memory("v_reset", v_reset)
        self.surrogate_function = Sigmoid() if surrogate_function is None else surrogate_function
        self.detach_reset = detach_reset

    def neuronal_fire(self):
        return self.surrogate_function(self.v - self.v_threshold)

    def neuronal_reset(self, spike):
        by = spike.detach() if self.detach_reset else spike
        if self.v_reset is None:
            self.v = self.v - by * self.v_threshold
        else:
            self.v = (1.0 - by) * self.v + by * self.v_reset

    def forward(self, x):
        self.neuronal_charge(x)
        spike = self.neuronal_fire()
        self.neuronal_reset(spike)
        return spike


class IFNode(BaseNode):
    def neuronal_charge(self, x):
        self.v = self.v + x


class LIFNode(BaseNode):
    def __init__(
        self,
        tau=2.0,
        decay_input=True,
        v_threshold=1.0,
        v_reset=0.0,
        surrogate_function=None,
        detach_reset=False,
    ):
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self.tau, self.decay_input = tau, decay_input

    def neuronal_charge(self, x):
        rest = self.v_reset or 0.0
        if self.decay_input:
            self.v = self.v + (x - (self.v - rest)) / self.tau
        elif rest:
            self.v = self.v - (self.v - rest) / self.tau + x
        else:
            self.v = self.v * (1.0 - 1.0 / self.tau) + x


class ParametricLIFNode(BaseNode):
    def __init__(
        self,
        init_tau=2.0,
        decay_input=True,
        v_threshold=1.0,
        v_reset=0.0,
        surrogate_function=None,
        detach_reset=False,
    ):
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self.decay_input = decay_input
        self.w = nn.Parameter(torch.tensor(-math.log(init_tau - 1)))

    def neuronal_charge(self, x):
        rest = self.v_reset or 0.0
        if self.decay_input:
            self.v = self.v + (x - (self.v - rest)) * self.w.sigmoid()
        elif rest:
            self.v = self.v - (self.v - rest) * self.w.sigmoid() + x
        else:
            self.v = self.v * (1.0 - self.w.sigmoid()) + x


class EIFNode(BaseNode):
    def __init__(self, tau=2.0, v_threshold=1.0, v_reset=-0.1, surrogate_function=None, detach_reset=False):
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self.tau = tau

    def neuronal_charge(self, x):
        v = torch.as_tensor(self.v)
        self.v = v + (x - v + torch.exp(v - 0.8)) / self.tau


def _multi_step(single_step):
    class MultiStep(single_step):
        def __init__(self, *args, backend="torch", **settings):
            super().__init__(*args, **settings)
            self.register_memory("v_seq", None)
            self.backend = backend

        def forward(self, x_seq):
            assert self.backend == "torch", "no kernels here"
            spikes, self.v_seq = [], []
            for x in x_seq:
                spikes.append(super().forward(x))
                self.v_seq.append(self.v)
            self.v_seq = torch.stack(self.v_seq)
            return torch.stack(spikes)

    MultiStep.__name__ = MultiStep.__qualname__ = f"MultiStep{single_step.__name__}"
    return MultiStep


MultiStepIFNode = _multi_step(IFNode)
MultiStepLIFNode = _multi_step(LIFNode)
MultiStepParametricLIFNode = _multi_step(ParametricLIFNode)
MultiStepEIFNode = _multi_step(EIFNode)


class Dropout(MemoryModule):
    def __init__(self, p=0.5):
        super().__init__()
        self.register_memory("mask", None)
        self.p = p

    def create_mask(self, x):
        self.mask = nn.functional.dropout(torch.ones_like(x), self.p)

    def forward(self, x):
        if not self.training:
            return x
        if self.mask is None:
            self.create_mask(x)
        return x * self.mask


class MultiStepDropout(Dropout):
    def forward(self, x_seq):
        if not self.training:
            return x_seq
        if self.mask is None:
            self.create_mask(x_seq[0])
        return x_seq * self.mask


class SynapseFilter(MemoryModule):
    def __init__(self, tau=100.0, learnable=False):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(-math.log(tau - 1)), requires_grad=learnable)
        self.register_memory("out_i", 0.0)

    def forward(self, spikes):
        self.out_i = self.out_i - (1 - spikes) * self.out_i * self.w.sigmoid() + spikes
        return self.out_i


class ElementWiseRecurrentContainer(MemoryModule):
    def __init__(self, sub_module, element_wise_function):
        super().__init__()
        self.sub_module, self.element_wise_function = sub_module, element_wise_function
        self.register_memory("y", None)

    def forward(self, x):
        y = torch.zeros_like(x) if self.y is None else self.y
        self.y = self.sub_module(self.element_wise_function(y, x))
        return self.y


class LinearRecurrentContainer(MemoryModule):
    def __init__(self, sub_module, in_features, out_features, bias=True):
        super().__init__()
        self.rc = nn.Linear(in_features + out_features, in_features, bias)
        self.sub_module, self.out_features = sub_module, out_features
        self.register_memory("y", None)

    def forward(self, x):
        y = x.new_zeros(*x.shape[:-1], self.out_features) if self.y is None else self.y
        self.y = self.sub_module(self.rc(torch.cat((x, y), -1)))
        return self.y


class MultiStepContainer(nn.Sequential):
    def forward(self, x_seq):
        steps = []
        for x in x_seq:
            steps.append(super().forward(x))
        return torch.stack(steps)


class SeqToANNContainer(nn.Sequential):
    def forward(self, x_seq):
        return super().forward(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


def reset_net(net):
    for module in net.modules():
        if hasattr(module, "reset"):
            module.reset()
