"""Whether networks fire and learn: what code trains is recorded, and trained on."""

import torch
from torch._subclasses import FakeTensor
from torch.nn import functional as F

import sltt_ext
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.online.time_loop import TimeLoop

RATE = 0.01  # of the neurons of a layer and the time steps, in a network as it is made
ITERATIONS = 12


class Seen:
    """The networks that code trains while this is in place, each with one more iteration of the same.

    Attributes:
        networks: Network -> a function that back-propagates once more, and returns the loss.
    """

    def __init__(self, monkeypatch):
        self.networks = {}
        train, run = sltt_ext.OnlineTrainer.forward_backward, TimeLoop.run

        def trained(online, x, target, **options):
            if not isinstance(x, FakeTensor):
                self.networks.setdefault(online.net, lambda: train(online, x, target).loss)
            return train(online, x, target, **options)

        def ran(loop, net, forward_of, args, kwargs):
            def again():
                loss = F.mse_loss(_first(run(loop, net, forward_of, args, kwargs)), aim)
                loss.backward()
                return loss.detach()

            returned = run(loop, net, forward_of, args, kwargs)
            output = _first(returned)
            if output.requires_grad and net not in self.networks:
                aim = torch.randn(output.shape)
                self.networks[net] = again
            return returned

        monkeypatch.setattr(sltt_ext.OnlineTrainer, "forward_backward", trained)
        monkeypatch.setattr(TimeLoop, "run", ran)


def _first(returned):
    """The first tensor that a network returns."""
    while not isinstance(returned, torch.Tensor):
        returned = next(iter(returned.values() if isinstance(returned, dict) else returned))
    return returned


def check(net, iteration, read_out=(), learns=True):
    """Train a network for some iterations: at first every layer fires, in the end the loss is smaller.

    Args:
        net: The network.
        iteration: Back-propagates, and returns the loss.
        read_out: Layers that are there for their potential.
        learns: Whether the iterations leave gradients, and do not only measure them.
    """
    if not sltt_ext.is_converted(net):  # what only measures a network leaves it as it was
        sltt_ext.convert(net)
    rates = {}

    def hook_of(path):
        def hook(module, args, returned):
            rates.setdefault(path, []).append(float((_first(returned) != 0).float().mean()))

        return hook

    handles = [module.register_forward_hook(hook_of(path)) for path, module in _layers(net)]
    optimizer = torch.optim.Adam([weight for weight in net.parameters() if weight.requires_grad], 3e-3)
    losses = []
    for number in range(ITERATIONS if learns else 1):
        optimizer.zero_grad()
        losses.append(float(iteration()))
        optimizer.step()
        if not number:
            for handle in handles:
                handle.remove()
    assert rates, net
    silent = {path: max(found) for path, found in rates.items() if max(found) < RATE and path not in read_out}
    assert not silent, (silent, net)
    assert not learns or sum(losses[-3:]) < sum(losses[:3]), (losses, net)


def _layers(net):
    for path, module in net.named_modules():
        inner = [one for one in module.modules() if one is not module]
        if _fires(module) and not any(map(_fires, inner)):
            yield path, module


def _fires(module):
    return isinstance(module, SLTTNeuron) and module.fires
