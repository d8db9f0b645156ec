"""What a user writes of the neurons of no framework in `networks`: each a step, as its forward has it."""

from published_style.networks import Fire, IntegerSpikes, LIFSpike, MemUpdate, Quantise

import sltt_ext


@sltt_ext.declare_neuron(MemUpdate, time_dim=0, spikes=0)
def mem_update(module, x, mem, spike):
    mem = x if mem is None else mem * module.decay * (1 - spike.detach()) + x
    spike = Fire.apply(mem - module.thresh)
    return spike, mem, spike


@sltt_ext.declare_neuron(LIFSpike, time_dim=1, spikes=0)
def lif_spike(module, x, mem):
    mem = x if mem is None else mem * module.tau + x
    spike = Fire.apply(mem - module.thresh)
    return spike, (1 - spike) * mem


@sltt_ext.declare_neuron(IntegerSpikes, time_dim=0)
def integer_spikes(module, x, mem, spike):
    mem = x if mem is None else (mem - spike) * module.decay + x
    spike = Quantise.apply(mem)
    return spike / 4, mem, spike
