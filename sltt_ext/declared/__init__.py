"""Neurons that belong to no framework: the user declares one step, or the state that they carry."""

from sltt_ext.declared.declaration import declare_neuron

__all__ = ["declare_neuron"]
