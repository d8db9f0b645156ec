"""Networks in the style of published code under a training script of their own: one changed line, and SLTT's gradient."""

import pytest
import torch
from published_style import networks, oracle
from published_style.networks import functional
from published_style.resformer import SpikingResformer
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sltt_ext
from sltt_ext.errors import SLTTWarning

pytestmark = pytest.mark.filterwarnings("ignore:batch norms take their statistics")


class StepByStep(nn.Module):
    """The original network, one step a call, its state detached after each."""

    def __init__(self, net):
        super().__init__()
        self.net, self.time_steps = net, net.T
        net.T = 1

    def forward(self, x):
        outputs = []
        for _ in range(self.time_steps):
            output = self.net(x)
            outputs.append(output[0] if output.dim() == 3 else output)
            oracle.detach(self.net)
        return torch.stack(outputs)


def of_the_mean(output, target):
    return F.cross_entropy(output.mean(0) if output.dim() == 3 else output, target, label_smoothing=0.1)


def of_each_step(output, target):
    return sum(F.cross_entropy(one, target, label_smoothing=0.1) for one in output) / len(output)


def train(net, loss):
    """A script of its own, with mixup and a moving average of the weights: all gradients, and that average."""
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    seen = []
    for share in (1.0, 0.7, 0.4):
        x, target = networks.images(), F.one_hot(networks.TARGET, 5).float()
        x, target = (share * one + (1 - share) * one.flip(0) for one in (x, target))
        optimizer.zero_grad()
        loss(net(x), target).backward()
        seen += [parameter.grad.clone() for parameter in net.parameters()]
        optimizer.step()
        average.update_parameters(net)
        functional.reset_net(net)
    return seen, [parameter.detach() for parameter in average.parameters()]


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (networks.Spikformer, of_the_mean),
        (networks.SEWResNet, of_the_mean),
        (SpikingResformer, of_the_mean),
        (lambda: SpikingResformer(averages=False), of_each_step),
    ],
    ids=["Spikformer", "SEW-ResNet", "SpikingResformer", "SpikingResformer, TET"],
)
def test_one_changed_line(make, loss):
    torch.manual_seed(2)
    reference = make()
    torch.manual_seed(2)
    net = make()
    net = sltt_ext.over_time(net, time_inside="T")
    gradients, average = train(net, loss)
    expected, expected_average = train(StepByStep(reference), loss)
    assert oracle.relative_error(gradients, expected) < 1e-5
    assert oracle.relative_error(average, expected_average) < 1e-5


def test_batch_norms_that_see_one_step_at_a_time_are_said():
    with pytest.warns(SLTTWarning, match="batch norms take their statistics over 1 step"):
        sltt_ext.over_time(SpikingResformer(), time_inside="T")(networks.images())
