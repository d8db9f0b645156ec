import pytest
import snntorch


@pytest.fixture(autouse=True)
def _own_instances():
    """SnnTorch keeps every neuron ever made in one list, and resets them all."""
    snntorch.SpikingNeuron.instances.clear()
