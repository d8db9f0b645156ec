from dataclasses import replace

import networks
import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.bptt import BPTTTrainer
from sltt_ext.errors import ConfigurationError
from sltt_ext.methods import COMPARED, Method, method_named
from sltt_ext.neuron import StatefulModule

T = 4


@pytest.mark.parametrize(
    ("name", "method", "shown"),
    [
        ("bptt", Method("bptt"), "BPTT"),
        ("sltt", Method("sltt"), "SLTT"),
        ("SLTT", Method("sltt"), "SLTT"),
        ("sltt-1", Method("sltt", k=1), "SLTT-1"),
        ("sltt-12", Method("sltt", k=12), "SLTT-12"),
    ],
)
def test_a_name_and_its_method(name, method, shown):
    assert method_named(name) == method
    assert method.name == shown
    assert method_named(method.name) == method


@pytest.mark.parametrize("name", ["", "ottt", "bptt-2", "sltt-0", "sltt-", "sltt-k", "sltt-2 ", "sltt-²", 2])
def test_names_of_no_method(name):
    with pytest.raises(ConfigurationError, match="method must be 'bptt', 'sltt' or"):
        method_named(name)


def test_bptt_has_no_k():
    with pytest.raises(ConfigurationError, match="leave k out"):
        replace(method_named("sltt-2"), algorithm="bptt")


@pytest.mark.parametrize(
    ("name", "steps", "backpropagated"), [("bptt", 3, 3), ("sltt", 3, 3), ("sltt-2", 3, 2), ("sltt-2", 1, 1)]
)
def test_how_many_steps_are_backpropagated(name, steps, backpropagated):
    method = method_named(name)
    assert method.backpropagated(steps) == backpropagated
    trainer = method.for_at_most(steps).trainer(networks.conv_net(), F.cross_entropy, steps)
    assert len(trainer.forward_backward(*networks.images()).time_steps) == backpropagated


def test_a_k_above_t_is_an_error_where_nobody_asked_for_at_most():
    with pytest.raises(ConfigurationError, match="k must be an integer from 1 to time_steps=2"):
        method_named("sltt-3").trainer(networks.conv_net(), F.cross_entropy, 2)


def gradients(trainer):
    torch.manual_seed(5)
    trainer.forward_backward(*networks.images())
    return oracle.gradients(trainer.net)


@pytest.mark.parametrize("name", COMPARED)
def test_the_gradient_is_that_of_the_trainer_by_hand(name):
    net, same = networks.conv_net(), networks.conv_net()
    same.load_state_dict(net.state_dict())
    if name == "bptt":
        by_hand = BPTTTrainer(same, F.cross_entropy, T)
    else:
        k = {"sltt": None, "sltt-2": 2, "sltt-1": 1}[name]
        by_hand = sltt_ext.OnlineTrainer(sltt_ext.convert(same), F.cross_entropy, T, k=k)
    actual = gradients(method_named(name).trainer(net, F.cross_entropy, T))
    for ours, theirs in zip(actual, gradients(by_hand), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, {"chunk": 1, "scale": "mean", "full_output": True, "cache_invariant": True, "pack_spikes": False}),
        ({"k": 2, "scale": "paper", "full_output": False}, {"scale": "paper", "full_output": False}),
        ({"k": 2, "schedule": "early"}, {"k": 2, "schedule": "early"}),
        ({"schedule": "early"}, {"k": None, "schedule": None}),
        ({"chunk": 2, "pack_spikes": True}, {"chunk": 2, "pack_spikes": True}),
        ({"chunk": "all", "cache_invariant": False}, {"chunk": T, "cache_invariant": False}),
        ({"chunk": "auto"}, {"chunk": "auto"}),
    ],
    ids=str,
)  # fmt: skip
def test_options_reach_the_trainer(options, given, handed_over):
    net = networks.conv_net(step_mode="m")
    Method("sltt", **options).trainer(net, F.cross_entropy, T)
    assert {name: handed_over[name] for name in given} == given


@pytest.fixture
def handed_over(monkeypatch):
    """The options that an `OnlineTrainer` was made with."""
    options = {}
    monkeypatch.setattr(
        "sltt_ext.methods.OnlineTrainer",
        lambda net, loss_fn, time_steps, **given: options.update(given),
    )
    return options


def test_all_steps_of_a_single_step_network_are_calls_of_one(handed_over):
    Method("sltt", chunk="all").trainer(networks.conv_net(), F.cross_entropy, T)
    assert handed_over["chunk"] == 1


class Whole(StatefulModule, nn.Module):
    whole_sequence = multi_step = True


def test_a_module_that_needs_its_whole_sequence_gets_it(handed_over):
    net = networks.conv_net(step_mode="m").append(Whole())
    method_named("sltt").trainer(net, F.cross_entropy, T)
    assert handed_over["chunk"] == T


def test_a_schedule_takes_the_place_of_random_steps():
    net = networks.conv_net()
    trainer = method_named("sltt-2").trainer(net, F.cross_entropy, T, schedule=lambda *_: [0, 3])
    assert trainer.forward_backward(*networks.images()).time_steps == (0, 3)


def test_the_backend_is_that_of_the_neurons():
    net = networks.conv_net()
    Method("sltt", backend="torch").trainer(net, F.cross_entropy, T)
    assert {
        m.sltt_backend
        for m in net.modules()
        if not isinstance(m, nn.Sequential) and hasattr(m, "sltt_backend")
    } == {"torch"}


def test_bptt_gets_back_the_frameworks_neurons():
    net = sltt_ext.convert(networks.conv_net())
    method_named("bptt").trainer(net, F.cross_entropy, T)
    assert not sltt_ext.is_converted(net)
