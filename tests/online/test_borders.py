import pytest
import torch

from sltt_ext.errors import ConfigurationError
from sltt_ext.online.borders import Border, Samples

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a view": lambda x: x.expand(2, *x.shape)[1].transpose(0, 1),
}


def border(levels=None, gradient=True):
    return Border("x", lambda: levels, gradient)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("most", [1, 2, 3, 7, 15])
def test_small_whole_numbers_are_kept_as_bits(most, layout):
    value = LAYOUTS[layout](torch.randint(0, most + 1, (3, 5, 7, 2)).float())
    kept = border((most, None))
    kept.put(0, value)
    assert torch.equal(kept.value(0), value)
    if layout != "a view":
        assert kept.value(0).stride() == value.stride()
    (packed,) = kept._values[0]
    assert sum(plane.numel() for plane in packed._planes) <= most.bit_length() * -(-value.numel() // 8)


def test_spikes_that_count_something_else_than_one():
    value = 2.5 * torch.randint(0, 2, (4, 9)).float()
    kept = border((1, torch.tensor(2.5)))
    kept.put(0, value)
    assert torch.equal(kept.value(0), value)


def test_gradients_come_back_to_the_border():
    kept, token, fired = border((1, None)), torch.zeros((), requires_grad=True), []
    kept.put(2, torch.ones(4, 3))
    entered = kept.enter(2, token, True, lambda *spikes: fired.append(spikes), None)
    (entered * torch.arange(3)).sum().backward()
    assert torch.equal(kept.gradient(2, None), torch.arange(3.0).expand(4, 3))
    assert kept.gradient(2, None) is None
    assert token.grad is None
    assert fired[0][0] is entered
    assert kept.starts() == []


def test_a_value_that_is_the_same_at_all_steps_has_one_gradient():
    kept, token = border(), torch.zeros((), requires_grad=True)
    value = torch.ones(4, 3)
    for start in range(3):
        kept.put(start, value.expand_as(value))
    assert kept.is_static
    kept.gather()
    for start in range(3):
        (2 * kept.enter(start, token, False, lambda *_: None, None)).sum().backward()
    assert torch.equal(kept.gradient(0, None), torch.full((4, 3), 6.0))
    other = border()
    other.put(0, value)
    other.put(1, value.clone())
    assert not other.is_static


@pytest.mark.parametrize("levels", [None, (1, None)])
def test_parts_of_the_batch(levels):
    kept, token = border(levels), torch.zeros((), requires_grad=True)
    value = torch.randint(0, 2, (5, 3)).float()
    parts = [Samples(0, 0, 2, 5), Samples(0, 2, 5, 5)]
    for part in parts:
        kept.put(0, part.of(value), part)
    assert torch.equal(kept.value(0), value)
    for part in parts:
        entered = kept.enter(0, token, False, lambda *_: None, part)
        assert torch.equal(entered, part.of(value))
        (entered * (part.start + 1)).sum().backward()
    found = torch.cat([kept.gradient(0, part) for part in parts])
    assert found[:2].eq(1).all()
    assert found[2:].eq(3).all()
    assert kept.gradient(0, None) is None


def test_a_value_that_is_changed_in_place():
    kept = border()
    kept.put(0, torch.ones(3))
    kept.value(0).add_(1)
    with pytest.raises(ConfigurationError, match="in place"):
        kept.value(0)


def test_what_is_no_tensor():
    with pytest.raises(ConfigurationError, match="not a tensor"):
        border().put(0, (torch.ones(3), torch.ones(3)))


def test_equal_values_are_one_where_they_may_be():
    kept = Border("x", lambda: None, True, may_be_same=True)
    kept.put(0, torch.ones(3))
    kept.put(1, torch.ones(3))
    assert kept.is_static
    kept.put(2, torch.zeros(3))
    assert not kept.is_static
    assert torch.equal(kept.value(2), torch.zeros(3))
