"""Networks whose own layers mix time steps, or average them, are right or said, with `MultiStep` too; the trial shows nowhere."""

import copy
import random
import warnings

import oracle
import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from step_networks import TARGET, Multi, N, Single, T, X, leaky, said, trainer
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import LossError, SLTTWarning
from sltt_ext.snntorch import MultiStep
from sltt_ext.step_trial import StepTrial


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


class FixedBatchConvolves(Convolves):
    """Of any other batch it can make nothing."""

    def forward(self, x_seq):
        return super().forward(x_seq.flatten(0, 1).view(len(x_seq), N, 8))


MIXED = {
    "convolution": (Convolves, "the input of 'lif'"),
    "attention": (Attends, "what it returns"),
    "a variable": (FeedsBack, "the input of 'lif'"),
    "a batch of one size": (FixedBatchConvolves, "the input of 'lif'"),
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


class NormOfEachStep(Multi):
    """A layer for each place in a call."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(T))
        for t, norm in enumerate(self.norms):
            nn.init.constant_(norm.weight, 1.0 + t)

    def forward(self, x_seq):
        return super().forward(torch.stack([norm(x) for norm, x in zip(self.norms, x_seq)]))


class StartsOtherwise(Multi):
    """Its first step is another one."""

    def forward(self, x_seq):
        return super().forward(torch.cat([2 * x_seq[:1], x_seq[1:]]))


@pytest.mark.parametrize("options", [{}, {"chunk": 4}, {"k": 1, "chunk": T}], ids=str)
@pytest.mark.parametrize("make", [NormOfEachStep, StartsOtherwise])
def test_steps_that_have_a_place_are_said_once(make, options):
    found = said(trainer(make(), **options))
    assert len(found) == 1
    assert "by their place in a call: with the same input, the input of 'lif' is another one" in found[0]
    assert said(trainer(make(), chunk=T)) == []


class FixedBatch(Multi):
    """Knows its batch size, of which it has two: another one would be read as other steps, or fail."""

    def forward(self, x_seq):
        h = F.linear(x_seq.flatten(0, 1), self.a.weight, self.a.bias)
        return self.c(self.lif(h.view(-1, N if x_seq.shape[1] == N else 4, 16)))


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


def test_another_batch_than_the_users_proves_nothing():
    """Two samples in the place of four would be read as half as many steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(FixedBatch()).forward_backward(X[:, :4], TARGET[:4])


def test_as_many_samples_as_steps():
    """An average over time has the shape of a sequence."""
    online = sltt_ext.OnlineTrainer(
        sltt_ext.convert(averaging()), F.cross_entropy, 2, time_dim=0, output=lambda average: average[None]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        online.forward_backward(X[:2, :2], TARGET[:2])


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


def test_a_trial_that_fails_is_none():
    def output(returned):
        assert returned.shape[1] == N, "it knows its batch size"
        assert len(returned) == 1
        return returned

    online = trainer(Multi(), output=output)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        online.forward_backward(X, TARGET)


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


@pytest.mark.parametrize("make", [NormsTheBatch, Centres, AttendsWithoutBatchFirst])
def test_one_step_in_a_call_folds_nothing(make):
    net = make(leaky)
    assert said(trainer(MultiStep(sltt_ext.convert(net))), iterations=1) == []
    assert oracle.relative_error(oracle.gradients(net), loop(make(leaky))[0]) < 1e-6


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
