"""One call of the network is so many steps: what runs other steps, or mixes them, is right or said."""

import copy
import random
import warnings

import oracle
import pytest
import snntorch
import torch
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, LossError, SLTTWarning
from sltt_ext.snntorch import MultiStep, Stateful
from sltt_ext.step_trial import StepTrial

T, N = 6, 5
X = 3 * torch.rand(T, N, 8, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 1, 2, 3, 0])
SOFT = torch.rand(N, 4, generator=torch.Generator().manual_seed(2))


def trainer(net, loss_fn=F.cross_entropy, **options):
    return sltt_ext.OnlineTrainer(sltt_ext.convert(net), loss_fn, T, **{"time_dim": 0, **options})


def said(online, target=TARGET, iterations=2):
    """The warnings of some iterations, other than torch's."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(iterations):
            online.forward_backward(X, target)
    return [str(one.message) for one in caught if issubclass(one.category, SLTTWarning)]


class Single(nn.Module):
    def __init__(self, make=neuron.LIFNode):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.lif, self.c = nn.Linear(8, 16), make(), nn.Linear(16, 4)

    def forward(self, x):
        return self.c(self.lif(self.a(x)))


class Multi(Single):
    def __init__(self):
        super().__init__(lambda: neuron.LIFNode(step_mode="m"))


def leaky():
    return snntorch.Leaky(beta=0.9, init_hidden=True)


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
    assert "have it run one step" in found[0]
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
    online = trainer(net)
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


@pytest.mark.parametrize("options", [{}, {"chunk": 3}, {"schedule": lambda T, _: [2, 3]}], ids=str)
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


# layers that mix time


class Convolves(Multi):
    """A delay: a causal convolution over time."""

    def __init__(self):
        super().__init__()
        self.delay = nn.Conv1d(8, 16, 3, dilation=2)

    def forward(self, x_seq):
        x = F.pad(x_seq.permute(1, 2, 0), (4, 0))
        return self.c(self.lif(self.delay(x).permute(2, 0, 1)))


class Attends(Multi):
    """Behind its neuron, over time."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x_seq):
        h = self.lif(self.a(x_seq))
        return self.c(self.attention(h, h, h)[0])


class AttendsToSamples(Attends):
    """Which is no mixing of time."""

    def forward(self, x_seq):
        return self.c(torch.stack([self.attention(h, h, h)[0] for h in self.lif(self.a(x_seq))]))


class FeedsBack(Multi):
    """A loop of its own, with a variable that goes from step to step."""

    def __init__(self):
        super().__init__()
        self.inner, self.back = neuron.LIFNode(), nn.Linear(16, 8)

    def forward(self, x_seq):
        s, steps = 0.0, []
        for x in x_seq:
            s = self.inner(self.a(x + s))
            steps.append(s)
            s = self.back(s)
        return self.c(self.lif(torch.stack(steps)))


MIXED = {
    "convolution": (Convolves, "the input of 'lif'"),
    "attention": (Attends, "what it returns"),
    "a variable": (FeedsBack, "the input of 'lif'"),
}


@pytest.mark.parametrize("options", [{}, {"chunk": 2}, {"k": 1, "chunk": T}], ids=str)
@pytest.mark.parametrize(("make", "where"), MIXED.values(), ids=MIXED)
def test_layers_that_mix_time_are_said_once(make, where, options):
    found = [text for text in said(trainer(make(), **options)) if "mixes time steps" in text]
    assert len(found) == 1
    assert where in found[0]
    assert "chunk=time_steps" in found[0]


@pytest.mark.parametrize("make", [Convolves, Attends])
def test_layers_that_mix_time_are_right_in_one_call(make):
    net, plain = make(), sltt_ext.convert(make())
    assert said(trainer(net, chunk=T), iterations=1) == []
    torch.stack([F.cross_entropy(output, TARGET) for output in plain(X)]).mean().backward()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(plain)) < 1e-6


class FixedBatch(Multi):
    """Knows its batch size: another one would be read as other steps."""

    def forward(self, x_seq):
        h = F.linear(x_seq.flatten(0, 1), self.a.weight, self.a.bias)
        return self.c(self.lif(h.view(-1, N, 16)))


class OwnNorm(Multi):
    """Batch statistics are those of a call, in the layer as in torch's."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16, track_running_stats=False)

    def forward(self, x_seq):
        return self.c(self.lif(self.norm(self.a(x_seq).flatten(0, 1)).view(*x_seq.shape[:2], 16)))


class Dropped(Multi):
    def forward(self, x_seq):
        return super().forward(F.dropout(x_seq, 0.3))


@pytest.mark.parametrize("make", [AttendsToSamples, FixedBatch, OwnNorm, Dropped])
def test_what_does_not_mix_time_is_not_said(make):
    assert said(trainer(make())) == []


class Recorded(Multi):
    """What a user would see of a run more: counters, records, hooks, random numbers, running statistics."""

    def __init__(self):
        super().__init__()
        self.norm, self.record, self.calls = nn.BatchNorm1d(8), [], 0
        self.lif.register_forward_hook(lambda *_: HOOKED.append(1))

    def forward(self, x_seq):
        self.calls += 1
        self.record.append(float(x_seq.mean()))
        x = self.norm(x_seq.flatten(0, 1)).view(x_seq.shape)
        return super().forward(x + torch.rand_like(x) * random.random())


HOOKED: list[int] = []


def test_the_trial_leaves_no_trace():
    def iteration(tried):
        net = Recorded()
        online = trainer(net)
        online._tried._is_over = not tried
        HOOKED.clear()
        torch.manual_seed(3)
        random.seed(3)
        online.forward_backward(X, TARGET)
        kept = [net.calls, net.record, len(HOOKED), torch.rand(1), random.random()]
        return kept, [*oracle.gradients(net), *net.buffers()]

    (kept, tensors), (kept_without, tensors_without) = iteration(True), iteration(False)
    assert kept == kept_without
    assert all(map(torch.equal, tensors, tensors_without))


def test_the_trial_is_of_a_copy_that_shares_the_weights():
    net = sltt_ext.convert(Multi())
    trial = StepTrial.of(net)
    assert trial is not None
    assert all(a is b for a, b in zip(trial.net.parameters(), net.parameters(), strict=True))
    assert not set(trial.net.modules()) & set(net.modules())


def test_what_cannot_be_copied_is_not_tried():
    net = Multi()
    net.stream = iter(open(__file__))  # noqa: SIM115
    assert StepTrial.of(sltt_ext.convert(net)) is None
    assert said(trainer(net)) == []


# networks that average inside


class AveragesOverTime(nn.Sequential):
    def forward(self, x_seq):
        return super().forward(x_seq).mean(0)


def averaging():
    torch.manual_seed(0)
    return AveragesOverTime(
        layer.Linear(8, 16, step_mode="m"), neuron.LIFNode(step_mode="m"), layer.Linear(16, 4, step_mode="m")
    )


AVERAGING = {
    "SLTT": {},
    "SLTT-1": {"schedule": lambda T, _: [4]},
    "SLTT-2": {"schedule": lambda T, _: [1, 4]},
    "nothing evaluated once": {"schedule": lambda T, _: [1, 4], "cache_invariant": False},
    "auto": {"chunk": "auto", "memory_budget": 2**30},
    "loss of the mean": {"loss_on": "mean"},
}


@pytest.mark.parametrize("options", AVERAGING.values(), ids=AVERAGING)
@pytest.mark.filterwarnings("ignore:chunk='auto' keeps to one step a call, .* it returns no output for each")
def test_the_recipe_for_networks_that_average_inside(options):
    net, plain = averaging(), nn.Sequential(*averaging())
    online = trainer(net, output=lambda average: average.unsqueeze(0), **options)
    step_by_step = trainer(plain, **{**options, "chunk": 1, "memory_budget": None})
    for _ in range(4):
        net.zero_grad()
        plain.zero_grad()
        online.forward_backward(X, TARGET)
        step_by_step.forward_backward(X, TARGET)
        assert oracle.relative_error(oracle.gradients(net), oracle.gradients(plain)) < 1e-6
    torch.testing.assert_close(online.predict(X), step_by_step.predict(X))


def test_a_chunk_of_a_network_that_averages_inside():
    online = trainer(averaging(), output=lambda average: average.unsqueeze(0), chunk=3)
    for run in (lambda: online.predict(X), lambda: online.forward_backward(X, TARGET)):
        with pytest.raises(LossError, match=r"leave the average over time to the trainer, or .*chunk=1"):
            run()


# what MultiStep folds into the batch


class NormsTheBatch(Single):
    def forward(self, x):
        return self.c(self.lif(F.batch_norm(self.a(x), None, None, training=True)))


class Centres(Single):
    def forward(self, x):
        h = self.a(x)
        return self.c(self.lif(h - h.mean(0, keepdim=True)))


class AttendsWithoutBatchFirst(Single):
    def __init__(self, make):
        super().__init__(make)
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        h = self.a(x)[:, None]
        return self.c(self.lif(self.attention(h, h, h)[0][:, 0]))


class OwnState(Single):
    def __init__(self, make):
        super().__init__(make)
        self.back, self.before = nn.Linear(16, 16), None

    def forward(self, x):
        h = self.a(x)
        if self.before is not None:
            h = h + self.back(self.before)
        spk = self.lif(h)
        self.before = spk.detach()
        return self.c(spk)


FOLDED = {
    "batch norm": (NormsTheBatch, "mixes the samples of a batch.*the input of 'net.lif'"),
    "centring": (Centres, "mixes the samples of a batch.*the input of 'net.lif'"),
    "attention": (AttendsWithoutBatchFirst, "mixes the samples of a batch.*the input of 'net.lif'"),
    "a state of its own": (OwnState, "keeps something of its own"),
}


def loop(net):
    """Gradients and mean output of the original, step by step."""
    outputs = []
    for x in X:
        output = net(x)
        (F.cross_entropy(output, TARGET) / T).backward()
        net.lif.detach_hidden()
        outputs.append(output.detach())
    return oracle.gradients(net), torch.stack(outputs).mean(0)


@pytest.mark.parametrize("chunk", [2, T])
@pytest.mark.parametrize(("make", "reason"), FOLDED.values(), ids=FOLDED)
def test_what_cannot_be_folded_runs_step_by_step(make, reason, chunk):
    net = make(leaky)
    online = trainer(MultiStep(sltt_ext.convert(net)), chunk=chunk)
    with pytest.warns(SLTTWarning, match=f"MultiStep runs the time steps one by one, since .*{reason}"):
        result = online.forward_backward(X, TARGET)
    gradients, output = loop(make(leaky))
    assert oracle.relative_error(oracle.gradients(net), gradients) < 1e-6
    torch.testing.assert_close(result.output, output)


def test_what_cannot_be_folded_without_a_trainer():
    multi_step, plain = MultiStep(sltt_ext.convert(Centres(leaky))), Centres(leaky)
    with pytest.warns(SLTTWarning, match="MultiStep runs the time steps one by one"):
        output_seq = multi_step(X)
    torch.testing.assert_close(output_seq, torch.stack([plain(x) for x in X]))


@pytest.mark.parametrize("chunk", [1, 2, T])
def test_what_can_be_folded_is_folded_in_silence(chunk):
    class Drops(Single):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.2, self.training))

    net = MultiStep(sltt_ext.convert(nn.Sequential(nn.BatchNorm1d(8), Drops(leaky))))
    assert said(trainer(net, chunk=chunk)) == []
    copy.deepcopy(net)


def test_the_counts_are_of_the_call_alone():
    """A loss that runs a part of the network again adds no step."""
    net = Multi()

    def loss_fn(output, target):
        net.lif(net.a(X[:1]))
        return F.cross_entropy(output, target)

    assert said(trainer(net, loss_fn)) == []
