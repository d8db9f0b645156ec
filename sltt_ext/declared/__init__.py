"""Neurons of no framework: the user says what one step of them is, or what they carry from step to step."""

from sltt_ext.declared.declaration import declare_neuron

__all__ = ["declare_neuron"]
