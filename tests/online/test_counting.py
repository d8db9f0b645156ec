"""One call of the network is so many steps: what runs other steps, resets or takes the batch for time is said."""

import oracle
import pytest
import snntorch
import torch
from snntorch import utils
from spikingjelly.activation_based import functional, neuron
from step_networks import SOFT, TARGET, Multi, N, Single, T, X, leaky, said, trainer
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, SLTTWarning
from sltt_ext.snntorch import MultiStep, Stateful

# neurons that run other steps than those of the call


class Loops(Single):
    def forward(self, x):
        return sum(super(Loops, self).forward(x) for _ in range(T)) / T


class LoopsWithStates(Single):
    """As snnTorch's tutorials do."""

    def __init__(self):
        super().__init__(lambda: snntorch.Leaky(beta=0.9))

    def forward(self, x):
        mem, outputs = self.lif.reset_mem(), []
        for _ in range(T):
            spk, mem = self.lif(self.a(x), mem)
            outputs.append(self.c(spk))
        return torch.stack(outputs)


class Repeats(Multi):
    """As the spike-driven transformers do with images."""

    def forward(self, x):
        if x.dim() < 5:
            x = x.unsqueeze(0).repeat(T, *[1] * x.dim())
        return super().forward(x).mean(0)


class BatchFirst(Multi):
    """Takes the samples of ``[1, N, ...]`` for steps."""

    def forward(self, x):
        return super().forward(x.transpose(0, 1)).mean(0, keepdim=True)


class Twice(Single):
    """A legitimate use: one neuron at two places of a step."""

    def __init__(self, make=neuron.LIFNode):
        super().__init__(make)
        self.b = nn.Linear(16, 16)

    def forward(self, x):
        return self.c(self.lif(self.b(self.lif(self.a(x)))))


OTHER_STEPS = {
    "a loop": (Loops, f"lif: a LIFNode runs {T} time steps in a call of 1"),
    "a loop, snnTorch": (lambda: Loops(leaky), f"lif: a Leaky runs {T} time steps in a call of 1"),
    "a loop with states": (LoopsWithStates, f"lif: a Leaky runs {T} time steps in a call of 1"),
    "an input that is repeated": (Repeats, f"lif: a LIFNode runs {T} time steps in a call of 1"),
    "samples taken for steps": (BatchFirst, f"lif: a LIFNode runs {N} time steps in a call of 1"),
    "a neuron at two places": (Twice, "lif: a LIFNode runs 2 time steps in a call of 1"),
    "a neuron at two places, snnTorch": (lambda: Twice(leaky), "lif: a Leaky runs 2 time steps in a call of 1"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), OTHER_STEPS.values(), ids=OTHER_STEPS)
def test_other_steps_than_those_of_the_call_are_said_once(make, message):
    target = SOFT if make is BatchFirst else TARGET
    loss_fn = F.mse_loss if make is BatchFirst else lambda output, _: output.pow(2).mean()
    found = [text for text in said(trainer(make(), loss_fn), target) if "runs" in text]
    assert len(found) == 1
    assert message in found[0]
    assert "make it run one step" in found[0]
    assert "at several places" in found[0]


@pytest.mark.parametrize("make", [neuron.LIFNode, leaky])
@pytest.mark.filterwarnings("ignore:the trainer calls the network")
def test_a_neuron_at_two_places_is_right(make):
    net = Twice(make)
    trainer(net).forward_backward(X, TARGET)
    plain = Twice(make)
    for x in X:
        (F.cross_entropy(plain(x), TARGET) / T).backward()
        functional.detach_net(plain)
        if make is leaky:
            plain.lif.detach_hidden()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(plain)) < 1e-6


def test_a_prediction_is_watched_as_well():
    online = trainer(Loops())
    with pytest.warns(SLTTWarning, match=f"runs {T} time steps"):
        online.predict(X)


QUIET = {
    "a single-step network": (Single, {}),
    "snnTorch": (lambda: Single(leaky), {}),
    "a multi-step network": (Multi, {}),
    "chunks that leave a rest": (Multi, {"chunk": 4}),
    "all steps in one call": (Multi, {"chunk": T}),
    "SLTT-K": (Multi, {"k": 2}),
    "a neuron alone": (lambda: neuron.ParametricLIFNode(step_mode="m"), {}),
    "MultiStep": (lambda: MultiStep(sltt_ext.convert(Single(leaky))), {"chunk": 3}),
}


@pytest.mark.parametrize(("make", "options"), QUIET.values(), ids=QUIET)
def test_nothing_is_said_of_other_networks(make, options):
    assert said(trainer(make(), **options)) == []


def test_a_state_that_is_passed_is_no_reset():
    class Step(Single):
        def forward(self, x, state):
            spk, mem = self.lif(self.a(x), self.lif.reset_mem() if state is None else state)
            return self.c(spk), mem

    net = Stateful(sltt_ext.convert(Step(lambda: snntorch.Leaky(beta=0.9))))
    assert said(sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0)) == []


def test_later_iterations_stand_around_no_neuron():
    net, standing = Multi(), []
    online = trainer(net, chunk=1, pack_spikes=False, cache_invariant=True)
    net.a.register_forward_hook(lambda *_: standing.append("forward" in vars(net.lif)))
    online.forward_backward(X, TARGET)
    online.forward_backward(X, TARGET)
    assert standing == [True] * T + [False] * T


# resets


class ResetsItself(Multi):
    def forward(self, x_seq):
        functional.reset_net(self)
        return super().forward(x_seq)


class ResetsItsMultiStep(Single):
    def __init__(self):
        super().__init__(leaky)

    def forward(self, x):
        utils.reset(self)
        return super().forward(x)


RESETS = {"SpikingJelly": ResetsItself, "snnTorch": lambda: MultiStep(sltt_ext.convert(ResetsItsMultiStep()))}


@pytest.mark.parametrize(
    "options", [{}, {"chunk": 3}, {"schedule": lambda T, _: [2, 3]}], ids=["steps", "chunks", "schedule"]
)
@pytest.mark.parametrize("make", RESETS.values(), ids=RESETS)
def test_a_network_that_resets_itself_is_refused_in_parts(make, options):
    net = make()
    online = trainer(net, **options)
    with pytest.raises(ConfigurationError, match=r"resets its neurons in forward.*chunk=time_steps"):
        online.forward_backward(X, TARGET)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("make", RESETS.values(), ids=RESETS)
def test_a_network_that_resets_itself_is_right_in_one_call(make):
    online = trainer(make(), chunk=T)
    plain = trainer(Multi() if make is ResetsItself else MultiStep(sltt_ext.convert(Single(leaky))), chunk=T)
    assert said(online) == said(plain) == []
    assert oracle.relative_error(oracle.gradients(online.net), oracle.gradients(plain.net)) < 1e-6


@pytest.mark.parametrize("reset", [functional.reset_net, utils.reset, lambda net: setattr(net.lif, "v", 0.0)])
def test_a_reset_at_every_single_step_is_said(reset):
    class Forgets(Single):
        def forward(self, x):
            reset(self)
            return super().forward(x)

    found = said(trainer(Forgets(leaky if reset is utils.reset else neuron.LIFNode)))
    assert len(found) == 1
    assert "is reset in the middle of a sequence: leave the reset out" in found[0]


class Inhibits(Single):
    """Changes the state from step to step, and resets nothing."""

    def forward(self, x):
        if isinstance(self.lif.v, torch.Tensor):
            self.lif.v = 0.9 * self.lif.v
        return super().forward(x)


def test_a_state_that_is_changed_is_not_reset():
    assert said(trainer(Inhibits())) == []


# batches


class BatchOfOne(Single):
    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


class TimeInFront(Single):
    def forward(self, x):
        return torch.stack([super().forward(x)] * 3)


class Patches(Single):
    """As detection heads do: more than one row for a sample."""

    def forward(self, x):
        return super().forward(torch.cat([x, 2 * x]))


@pytest.mark.filterwarnings("ignore:Using a target size")  # torch's own
@pytest.mark.parametrize(
    ("make", "shape"), [(BatchOfOne, r"\[1, 4\], with 1"), (TimeInFront, r"\[3, 5, 4\], with 3")]
)
def test_an_output_of_another_batch_is_said(make, shape):
    with pytest.warns(SLTTWarning, match=rf"for a batch of {N}, the output of one step has shape {shape}"):
        trainer(make(), F.mse_loss).forward_backward(X, SOFT)


def test_an_output_of_more_rows_is_not():
    assert said(trainer(Patches(), lambda output, _: output.pow(2).mean())) == []


def test_the_counts_are_of_the_call_alone():
    """A loss that runs a part of the network again adds no step."""
    net = Multi()

    def loss_fn(output, target):
        net.lif(net.a(X[:1]))
        return F.cross_entropy(output, target)

    assert said(trainer(net, loss_fn)) == []
