"""What the processes of the tests of a network over time run: iterations, and how often they talked to each other."""

import networks
import snntorch
import torch
from distributed_runs import Counted, T, batch, counts, full, gradients, settings, shard
from spikingjelly.activation_based import layer, neuron
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F

import sltt_ext


def over_time(step_mode="s", **options):
    return sltt_ext.over_time(networks.conv_net(step_mode=step_mode), T, **options)


def draws_two(drawn):
    """A schedule of two random steps, that writes down which."""

    def schedule(time_steps, generator):
        drawn.append(torch.randperm(time_steps, generator=generator)[:2].tolist())
        return drawn[-1]

    return schedule


def ddp(rank, world_size, options, wrapper, step_mode="s", compiled=False):
    """Three iterations; gradients and all-reduces of the last one."""
    counted = Counted(over_time(step_mode, **options), **wrapper)
    net = torch.compile(counted.net, backend="eager") if compiled else counted.net
    for _ in range(3):
        counted.net.zero_grad()
        before = counted.reduced
        x, target = batch(rank, world_size)
        F.cross_entropy(net(x), target).backward()
    return {"gradients": gradients(counted.net), "reduced": counted.reduced - before}


def drawn(rank, world_size, seeded):
    """The steps of five iterations, from a generator, or the default one, that is another in each process."""
    generator = torch.Generator().manual_seed(5 + rank) if seeded else None
    drawn = []
    counted = Counted(over_time(schedule=draws_two(drawn), generator=generator))
    torch.manual_seed(rank)  # making the network has seeded them all alike
    x, target = batch(rank, world_size)
    for _ in range(5):
        counted.net.zero_grad()
        F.cross_entropy(counted.net(x), target).backward()
    return {"drawn": drawn, "gradients": gradients(counted.net)}


def accumulation(rank, world_size):
    """Three batches, synchronised with the third."""
    counted = Counted(over_time())
    for i in range(3):
        x, target = batch(rank, world_size, seed=i)
        counted.net.require_backward_grad_sync = i == 2  # what no_sync() sets
        F.cross_entropy(counted.net(x), target).backward()
    return {"gradients": gradients(counted.net), "reduced": counted.reduced}


def two_views(rank, world_size, wrapper):
    """Two forward passes, and one backward pass through both."""
    counted = Counted(over_time(), **wrapper)
    (x, target), (other, _) = batch(rank, world_size), batch(rank, world_size, seed=2)
    first, second = counted.net(x), counted.net(other)
    (F.cross_entropy(first, target) + F.mse_loss(first, second)).backward()
    return {"gradients": gradients(counted.net), "reduced": counted.reduced}


class WithUnused(nn.Module):
    """A spiking network and a layer that no output follows from."""

    def __init__(self):
        super().__init__()
        self.net, self.unused = networks.conv_net(), nn.Linear(2, 2)

    def forward(self, x):
        return self.net(x)


def unused(rank, world_size, wrapper):
    counted = Counted(sltt_ext.over_time(WithUnused(), T), **wrapper)
    for _ in range(2):
        counted.net.zero_grad()
        x, target = batch(rank, world_size)
        F.cross_entropy(counted.net(x), target).backward()
    return {
        "gradients": gradients(counted.net.module.net),
        "unused": [parameter.grad for parameter in counted.net.module.unused.parameters()],
    }


class Surrounded(nn.Module):
    """A spiking part that runs over time, in a network that is wrapped as a whole."""

    def __init__(self, part):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.part, self.head = nn.Conv2d(1, 1, 3, padding=1), part, nn.Linear(5, 5)

    def forward(self, x):
        return self.head(self.part(3 * self.encoder(x).relu()).tanh())


def part(rank, world_size):
    drawn = []
    counted = Counted(Surrounded(over_time(schedule=draws_two(drawn))))
    x, target = batch(rank, world_size)
    F.cross_entropy(counted.net(x), target).backward()
    return {"gradients": gradients(counted.net), "reduced": counted.reduced, "drawn": drawn}


def norm_net():
    return networks.conv_net().insert(1, layer.BatchNorm2d(6))


def norms(rank, world_size):
    """Statistics are those of each process's batch."""
    counted = Counted(sltt_ext.over_time(norm_net(), T))
    x, target = batch(rank, world_size)
    F.cross_entropy(counted.net(x), target).backward()
    return {"gradients": gradients(counted.net)}


def leaky_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), snntorch.Leaky(beta=0.9, init_hidden=True), nn.Linear(32, 5)
    )


def carried(rank, world_size):
    """Each process goes on from its own state; snnTorch keeps it in a buffer."""
    net = Counted(sltt_ext.over_time(leaky_net(), T, carry=True)).net
    x, target = batch(rank, world_size)
    for _ in range(2):
        net.zero_grad()
        F.cross_entropy(net(3 * x), target).backward()
    return {"gradients": gradients(net)}


def only_the_root(net, **options):
    return fully_shard(net, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)), **options)


def only_parts(net, **options):
    for module in net:
        if any(True for _ in module.parameters()):
            only_the_root(module, **options)
    return net


SHARDED = {"parts and root": shard, "root": only_the_root, "parts": only_parts}


def sharded_over_time(how, before, options=None, **fsdp_options):
    net = networks.conv_net()
    net = SHARDED[how](net, **fsdp_options) if before else net
    sltt_ext.over_time(net, T, **(options or {}))
    return net if before else SHARDED[how](net, **fsdp_options)


def fsdp(rank, world_size, how, before, options, fsdp_options):
    """Three iterations, of which two update."""
    net = sharded_over_time(how, before, options, **fsdp_options)
    optimizer, (x, target) = torch.optim.SGD(net.parameters(), 0.05), batch(rank, world_size)
    told = []
    for i in range(3):
        net.zero_grad()
        with CommDebugMode() as communication:
            F.cross_entropy(net(x).float(), target).backward()
        told.append(settings(net))
        if i < 2:
            optimizer.step()
    return {
        "gradients": full(gradients(net)),
        "counts": counts(communication),
        "sharded": all(isinstance(parameter, DTensor) for parameter in net.parameters()),
        "settings": told,
    }


def fsdp_drawn(rank, world_size, how):
    drawn = []
    generator = torch.Generator().manual_seed(5 + rank)
    net = sharded_over_time(how, False, {"schedule": draws_two(drawn), "generator": generator})
    x, target = batch(rank, world_size)
    for _ in range(2):
        net.zero_grad()
        F.cross_entropy(net(x), target).backward()
    return {"gradients": full(gradients(net)), "drawn": drawn}


def mixed_net():
    """Neurons that compute in whatever precision they are given."""
    return networks.conv_net(neuron.QIFNode, v_c=0.5, v_threshold=0.8)


def fsdp_mixed(rank, world_size):
    net = sltt_ext.over_time(
        shard(mixed_net(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)), T
    )
    x, target = batch(rank, world_size)
    output = net(x)
    F.cross_entropy(output.float(), target).backward()
    return {"gradients": full(gradients(net)), "dtype": output.dtype}


def fsdp_accumulation(rank, world_size, how):
    """Three batches, reduced with the third."""
    net = sharded_over_time(how, before=True)
    with CommDebugMode() as communication:
        for i in range(3):
            for module in net.modules():
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(i == 2)
            x, target = batch(rank, world_size, seed=i)
            F.cross_entropy(net(x), target).backward()
    return {"gradients": full(gradients(net)), "counts": counts(communication)}


def fsdp_two_views(rank, world_size, how):
    net = sharded_over_time(how, before=True)
    (x, target), (other, _) = batch(rank, world_size), batch(rank, world_size, seed=2)
    first, second = net(x), net(other)
    (F.cross_entropy(first, target) + F.mse_loss(first, second)).backward()
    return {"gradients": full(gradients(net))}


def fsdp_part(rank, world_size, how):
    """What is over time is a part of what is sharded; the input of the part has a gradient."""
    net = Surrounded(over_time())
    if how == "parts and root":
        only_parts(net.part)
    only_the_root(net)
    x, target = batch(rank, world_size)
    for _ in range(2):
        net.zero_grad()
        F.cross_entropy(net(x), target).backward()
    return {"gradients": full(gradients(net))}


def fsdp_crash(rank, world_size, how):
    """The gradient of an iteration after one whose backward pass was interrupted, in all processes."""
    net, calls = sharded_over_time(how, before=True), []
    net[4].register_forward_hook(lambda *_: calls.append(1) if len(calls) != T + 2 else interrupt())

    def interrupt():
        calls.append(1)
        raise KeyboardInterrupt

    x, target = batch(rank, world_size)
    try:
        F.cross_entropy(net(x), target).backward()
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError
    F.cross_entropy(net(x), target).backward()
    return {"gradients": full(gradients(net))}
