"""Small networks in the style of published code: what carries a state, where time is, what comes out.

Those with an attribute ``T`` have their time inside. They are plain PyTorch and SpikingJelly 0.0.0.0.12; nothing in here knows of
sltt_ext but for the line that puts the old package in place.
"""

import torch
from torch import nn
from torch.nn import functional as F

import sltt_ext.clock_driven  # noqa: F401  isort: skip

from spikingjelly.clock_driven import functional, layer, neuron, surrogate  # isort: skip


class Fire(torch.autograd.Function):
    """A rectangle for a surrogate, as in code of no framework."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0].abs() < 0.5)


class Quantise(torch.autograd.Function):
    """Integer-valued spikes from 0 to 4, whose gradient passes where they are not clipped."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return u.clamp(0, 4).round()

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad * (u >= 0) * (u <= 4)


def over_time(module, x):
    """A layer without a state, over ``[T, N, ...]``."""
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


# spikformer: patches, spiking self-attention, MLP; the image is repeated T times, and the head reads the mean


class SpikingAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.q_bn, self.k_bn, self.v_bn, self.proj_bn = (nn.BatchNorm1d(dim) for _ in range(4))
        self.q_lif, self.k_lif, self.v_lif, self.proj_lif = (
            neuron.MultiStepLIFNode(tau=2.0, detach_reset=True, backend="torch") for _ in range(4)
        )
        self.attn_lif = neuron.MultiStepLIFNode(tau=2.0, v_threshold=0.5, detach_reset=True, backend="torch")

    def _branch(self, x, linear, norm, lif):
        T, N, L, C = x.shape
        y = norm(linear(x.flatten(0, 1)).transpose(-1, -2)).transpose(-1, -2)
        return lif(y.reshape(T, N, L, C))

    def forward(self, x):
        T, N, L, C = x.shape
        q, k, v = (
            self._branch(x, linear, norm, lif).reshape(T, N, L, self.heads, C // self.heads).transpose(2, 3)
            for linear, norm, lif in (
                (self.q, self.q_bn, self.q_lif),
                (self.k, self.k_bn, self.k_lif),
                (self.v, self.v_bn, self.v_lif),
            )
        )
        y = (q @ k.transpose(-2, -1)) @ v * 0.125
        y = self.attn_lif(y.transpose(2, 3).reshape(T, N, L, C))
        return self._branch(y, self.proj, self.proj_bn, self.proj_lif)


class Spikformer(nn.Module):
    def __init__(self, T=4, dim=16, classes=5):
        super().__init__()
        self.T = T
        self.patches = nn.Sequential(nn.Conv2d(3, dim, 4, 4), nn.BatchNorm2d(dim))
        self.patch_lif = neuron.MultiStepLIFNode(tau=2.0, detach_reset=True, backend="torch")
        self.attention = SpikingAttention(dim, 4)
        self.fc, self.fc_bn = nn.Linear(dim, dim), nn.BatchNorm1d(dim)
        self.fc_lif = neuron.MultiStepLIFNode(tau=2.0, detach_reset=True, backend="torch")
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = (x.unsqueeze(0)).repeat(self.T, 1, 1, 1, 1)
        x = self.patch_lif(over_time(self.patches, x)).flatten(-2).transpose(-1, -2)
        x = x + self.attention(x)
        T, N, L, C = x.shape
        y = self.fc_bn(self.fc(x.flatten(0, 1)).transpose(-1, -2)).transpose(-1, -2).reshape(T, N, L, C)
        x = x + self.fc_lif(y)
        return self.head(x.mean(2).mean(0))


# spike-element-wise residual blocks


class SEWBlock(nn.Module):
    def __init__(self, planes, connect_f="ADD"):
        super().__init__()
        self.connect_f = connect_f
        self.conv1, self.conv2 = (
            layer.SeqToANNContainer(
                nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
            )
            for _ in range(2)
        )
        self.sn1, self.sn2 = (
            neuron.MultiStepIFNode(detach_reset=True, surrogate_function=surrogate.ATan()) for _ in range(2)
        )

    def forward(self, x):
        out = self.sn2(self.conv2(self.sn1(self.conv1(x))))
        return out + x if self.connect_f == "ADD" else x * (1.0 - out)


class SEWResNet(nn.Module):
    def __init__(self, T=4, planes=6, classes=5):
        super().__init__()
        self.T = T
        self.stem = nn.Sequential(nn.Conv2d(3, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes))
        self.sn = neuron.MultiStepIFNode(detach_reset=True, surrogate_function=surrogate.ATan())
        self.blocks = nn.Sequential(SEWBlock(planes), SEWBlock(planes, "IAND"))
        self.pool = layer.SeqToANNContainer(nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(planes, classes)

    def forward(self, x):
        x = self.stem(x)
        x = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        x = self.pool(self.blocks(self.sn(x)))
        return self.fc(torch.flatten(x, 2).mean(dim=0))


# parametric LIF: single steps, counted in a loop of the network's own, dropout that keeps its mask


class PLIFNet(nn.Module):
    def __init__(self, T=4, channels=6, classes=5):
        super().__init__()
        self.T = T
        self.static_conv = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        self.conv = nn.Sequential(
            neuron.ParametricLIFNode(init_tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True),
            nn.AvgPool2d(2),
        )
        self.fc = nn.Sequential(
            nn.Flatten(),
            layer.Dropout(0.5),
            nn.Linear(channels * 16, classes * 2, bias=False),
            neuron.ParametricLIFNode(init_tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True),
        )
        self.boost = nn.AvgPool1d(2, 2)

    def forward(self, x):
        x = self.static_conv(x)
        out_spikes_counter = self.boost(self.fc(self.conv(x)).unsqueeze(1)).squeeze(1)
        for _ in range(1, self.T):
            out_spikes_counter += self.boost(self.fc(self.conv(x)).unsqueeze(1)).squeeze(1)
        return out_spikes_counter / self.T


# membrane shortcuts: a loop with local variables, batch norm over time as a third dimension


class MemUpdate(nn.Module):
    """``[T, N, ...]``, of no framework."""

    decay, thresh = 0.25, 0.5
    hold = staticmethod(lambda state: state)

    def forward(self, x):
        mem_old, spike, output = 0, 0, []
        for i in range(x.shape[0]):
            mem = self.hold(mem_old) * self.decay * (1 - self.hold(spike).detach()) + x[i] if i >= 1 else x[i]
            spike = Fire.apply(mem - self.thresh)
            mem_old = mem.clone()
            output.append(spike)
        return torch.stack(output)


class TimeBatchNorm(nn.Module):
    """The norm scaled to the threshold, over time, samples and places."""

    def __init__(self, features, threshold=0.5):
        super().__init__()
        self.bn = nn.BatchNorm3d(features)
        nn.init.constant_(self.bn.weight, threshold)

    def forward(self, x):
        return self.bn(x.permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4)


class MSResNet(nn.Module):
    def __init__(self, T=4, planes=6, classes=5):
        super().__init__()
        self.T = T
        self.stem, self.stem_bn = nn.Conv2d(3, planes, 3, padding=1), TimeBatchNorm(planes)
        self.lif1, self.lif2, self.lif3 = MemUpdate(), MemUpdate(), MemUpdate()
        self.conv1, self.conv2 = (nn.Conv2d(planes, planes, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = TimeBatchNorm(planes), TimeBatchNorm(planes)
        self.fc = nn.Linear(planes, classes)

    def forward(self, x):
        x = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        x = self.stem_bn(over_time(self.stem, x))
        y = self.bn1(over_time(self.conv1, self.lif1(x)))
        x = x + self.bn2(over_time(self.conv2, self.lif2(y)))
        return self.fc(self.lif3(x).mean((-2, -1)).mean(0))


# temporal efficient training: [N, T, ...], an output for each step


class LIFSpike(nn.Module):
    """``[N, T, ...]``, of no framework."""

    hold = staticmethod(lambda state: state)

    def __init__(self, thresh=1.0, tau=0.5):
        super().__init__()
        self.thresh, self.tau = thresh, tau

    def forward(self, x):
        mem, spikes = 0, []
        for t in range(x.shape[1]):
            mem = self.hold(mem) * self.tau + x[:, t, ...]
            spike = Fire.apply(mem - self.thresh)
            mem = (1 - spike) * mem
            spikes.append(spike)
        return torch.stack(spikes, dim=1)


class TETNet(nn.Module):
    def __init__(self, T=4, channels=6, classes=5):
        super().__init__()
        self.T = T
        self.conv = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.act, self.act2 = LIFSpike(), LIFSpike()
        self.fc1, self.fc2 = nn.Linear(channels * 64, 16), nn.Linear(16, classes)

    def forward(self, x):
        x = x.unsqueeze(1).repeat(1, self.T, 1, 1, 1)
        x = self.act(2 * over_time(self.conv, x))
        return self.fc2(self.act2(self.fc1(torch.flatten(x, 2))))  # [N, T, classes]


# complementary LIF: a second state, and the step in a forward of the subclass


class ComplementaryLIF(neuron.LIFNode):
    def __init__(self, tau=2.0, v_threshold=1.0, v_reset=None, surrogate_function=None, **kwargs):
        fires = surrogate.ATan() if surrogate_function is None else surrogate_function
        super().__init__(tau, False, v_threshold, v_reset, fires)
        self.register_memory("m", 0.0)

    def forward(self, x):
        self.neuronal_charge(x)
        self.m = self.m * torch.sigmoid(self.v / self.tau)
        spike = self.neuronal_fire()
        self.m += spike
        self.neuronal_reset(spike)
        self.v = self.v - spike * torch.sigmoid(self.m)
        return spike


class CLIFNet(nn.Module):
    """One step a call: the loop over time is the training script's."""

    def __init__(self, channels=6, classes=5):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = ComplementaryLIF(tau=2.0), ComplementaryLIF(tau=2.0)
        self.fc1, self.fc2 = nn.Linear(channels * 64, 16), nn.Linear(16, classes)

    def forward(self, x):
        x = self.relu1(self.bn(self.conv(x)))
        return self.fc2(self.relu2(self.fc1(x.flatten(1))))


# depth from events: a U-Net, and one neuron that never fires, whose potential is read out scale by scale


class StereoNet(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.bottom = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), self._spikes())
        self.conv1 = nn.Sequential(nn.Conv2d(channels, channels, 3, stride=2, padding=1), self._spikes())
        self.deconv1 = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1), self._spikes()
        )
        self.predict2 = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, 1, 3, padding=1))
        self.predict1 = nn.Conv2d(channels, 1, 3, padding=1)
        self.Ineurons = neuron.IFNode(
            v_threshold=float("inf"), v_reset=0.0, surrogate_function=surrogate.ATan()
        )

    @staticmethod
    def _spikes():
        return neuron.IFNode(v_threshold=0.3, surrogate_function=surrogate.ATan(), detach_reset=True)

    def forward(self, x):
        out_bottom = self.bottom(x)
        out_conv1 = self.conv1(out_bottom)
        self.Ineurons(self.predict2(out_conv1))
        depth2 = self.Ineurons.v
        out_add1 = self.deconv1(out_conv1) + out_bottom
        self.Ineurons(self.predict1(out_add1))
        depth1 = self.Ineurons.v
        return [depth1, depth2], [out_conv1, out_add1]


# deep Q-learning: T steps for each state of the game, several calls a loss


class SpikingQNetwork(nn.Module):
    def __init__(self, T=4, actions=3):
        super().__init__()
        self.T = T
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.lif1 = neuron.MultiStepLIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True)
        self.fc1 = layer.SeqToANNContainer(nn.Flatten(), nn.Linear(6 * 64, 16))
        self.lif2 = neuron.MultiStepLIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True)
        self.fc2 = nn.Linear(16, actions)

    def forward(self, x):
        x_seq = self.conv(x).unsqueeze(dim=0).repeat(self.T, 1, 1, 1, 1)
        x_seq = self.lif2(self.fc1(self.lif1(x_seq)))
        values = self.fc2(x_seq.mean(dim=0))
        functional.reset_net(self)
        return values


class PublishedQNetwork(SpikingQNetwork):
    """As it was published: T in a private attribute, and a reset by whoever calls it."""

    def __init__(self, T=4):
        super().__init__()
        self._T = T
        del self.T

    def forward(self, x):
        x_seq = self.conv(x).unsqueeze(dim=0).repeat(self._T, 1, 1, 1, 1)
        return self.fc2(self.lif2(self.fc1(self.lif1(x_seq))).mean(dim=0))


# a language model whose tokens are the steps


class SpikingBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mix, self.ffn = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.lif1, self.lif2 = (
            neuron.MultiStepLIFNode(
                tau=2.0, surrogate_function=surrogate.ATan(alpha=2.0), backend="torch", v_threshold=0.5
            )
            for _ in range(2)
        )

    def forward(self, x):
        x = x + self.lif1(self.mix(self.ln1(x)).permute(1, 0, 2)).permute(1, 0, 2)
        return x + self.lif2(self.ffn(self.ln2(x)).permute(1, 0, 2)).permute(1, 0, 2)


class SpikeGPT(nn.Module):
    def __init__(self, vocabulary=20, dim=16):
        super().__init__()
        self.emb = nn.Embedding(vocabulary, dim)
        self.blocks = nn.Sequential(SpikingBlock(dim), SpikingBlock(dim))
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens):
        functional.reset_net(self)
        return self.head(self.blocks(self.emb(tokens)))


# integer-valued spikes


class IntegerSpikes(nn.Module):
    """``[T, N, ...]``, of no framework; up to four spikes at once."""

    decay = 0.25
    hold = staticmethod(lambda state: state)

    def forward(self, x):
        output, mem, spike = [], 0, 0
        for i in range(x.shape[0]):
            mem = (self.hold(mem) - self.hold(spike)) * self.decay + x[i] if i else x[i]
            spike = Quantise.apply(mem)
            output.append(spike)
        return torch.stack(output) / 4


class IntegerNet(nn.Module):
    def __init__(self, T=4, channels=6, classes=5):
        super().__init__()
        self.T = T
        self.conv, self.bn = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.lif1, self.lif2 = IntegerSpikes(), IntegerSpikes()
        self.fc1, self.fc2 = nn.Linear(channels * 64, 16), nn.Linear(16, classes)

    def forward(self, x):
        x = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        x = self.lif1(over_time(lambda y: 2 * self.bn(self.conv(y)), x))
        x = self.lif2(4 * self.fc1(torch.flatten(x, 2)))
        return self.fc2(x.mean(0)), x  # code of this family returns more than the logits


def images():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tokens():
    return torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(1))


TARGET = torch.tensor([0, 2, 1])


def cross_entropy(output):
    return F.cross_entropy(output if isinstance(output, torch.Tensor) else output[0], TARGET)


def tet_loss(output):
    return sum(F.cross_entropy(output[:, t], TARGET) for t in range(output.shape[1])) / output.shape[1]


def next_token(logits):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
