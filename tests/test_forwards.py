"""Replacing what modules do, for a while: order, restoring, and who else replaces something."""

from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from sltt_ext.forwards import Layer, Replacements, has_own_forward


class Named(nn.Module):
    def forward(self, x):
        return [*x, "own"]


def says(name):
    return lambda module, forward, x: forward([*x, name])


def test_layers_are_ordered_by_what_they_do():
    module = Named()
    with Replacements() as replaced:
        replaced.forward(module, Layer.PARTS, says("parts"))
        replaced.forward(module, Layer.OWN, says("next to it"))
        replaced.forward(module, Layer.STEPS, says("steps"))
        replaced.forward(module, Layer.PARTS, says("parts, later"))
        assert module([]) == ["steps", "parts, later", "parts", "next to it", "own"]
    assert module([]) == ["own"]
    assert "forward" not in vars(module)


def test_blocks_in_any_order():
    module, outer, inner = Named(), Replacements(), Replacements()
    outer.forward(module, Layer.STEPS, says("steps"))
    inner.forward(module, Layer.OWN, says("next to it"))
    outer.undo()
    assert module([]) == ["next to it", "own"]
    inner.undo()
    assert "forward" not in vars(module)


def test_hooks_stay_outside():
    module, seen = Named(), []
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with Replacements() as replaced:
        replaced.forward(module, Layer.OWN, says("layer"))
        module([])
    assert seen == [["layer", "own"]]


def test_another_forward_of_the_same_module_comes_back():
    module = Named()
    mine = module.forward = lambda x: [*x, "mine"]
    assert has_own_forward(module)
    with Replacements() as replaced:
        replaced.forward(module, Layer.OWN, says("layer"))
        assert module([]) == ["layer", "mine"]
        assert has_own_forward(module)
    assert module.forward is mine


def test_who_replaces_it_meanwhile_keeps_the_module_s_own():
    module = Named()
    with Replacements() as replaced:
        replaced.forward(module, Layer.OWN, says("layer"))
        assert not has_own_forward(module)
        before = module.forward
        module.forward = lambda x: before([*x, "theirs"])
        assert module([]) == ["theirs", "layer", "own"]
    assert module([]) == ["theirs", "own"]


def test_attributes():
    module = Named()
    module.kept = 1
    kept = vars(module).copy()
    with Replacements() as replaced:
        replaced.attribute(module, "kept", 2)
        replaced.attribute(module, "kept", 3)
        replaced.attribute(module, "new", 4)
        assert (module.kept, module.new) == (3, 4)
    assert vars(module) == kept


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_everything_is_put_back_after_an_error(error):
    module = Named()

    def fails(module, forward, x):
        raise error

    def run():
        with Replacements() as replaced:
            replaced.attribute(module, "new", 1)
            replaced.forward(module, Layer.OWN, fails)
            module([])

    with pytest.raises(error):
        run()
    assert "forward" not in vars(module)
    assert not hasattr(module, "new")


class Once:
    """Fails the first time."""

    def __init__(self, error):
        self.errors = [error]

    def __call__(self):
        if self.errors:
            raise self.errors.pop()


def interrupted(replaced, module, *, begins=False):
    replaced.attribute(module, "new", 1)
    replaced.forward(module, Layer.OWN, says("layer"))
    replaced.at_end(Once(KeyboardInterrupt))
    replaced.attribute(module, "later", 2)
    if begins:
        replaced.begins_at([module])
        replaced.at_end(Once(KeyboardInterrupt))


def test_an_interrupt_while_putting_back():
    module, replaced = Named(), Replacements()
    kept = vars(module).copy()
    with pytest.raises(KeyboardInterrupt), replaced, replaced:
        interrupted(replaced, module)
    assert vars(module) == kept


def test_the_next_block_puts_back_what_a_second_interrupt_has_left():
    module, replaced = Named(), Replacements()
    kept = vars(module).copy()
    with pytest.raises(KeyboardInterrupt), replaced, replaced:
        interrupted(replaced, module, begins=True)
    assert vars(module) != kept
    Replacements().begins_at([module])
    assert vars(module) == kept


def test_a_block_that_is_not_over_is_left_alone():
    module, outer = Named(), Replacements()
    with outer, outer:
        outer.begins_at([module])
        outer.attribute(module, "new", 1)
        Replacements().begins_at([module])
        assert module.new == 1
        assert not outer.is_latest_at([module])


def test_an_error_while_putting_back_keeps_nothing_else_from_it():
    module, replaced = Named(), Replacements()
    kept = vars(module).copy()
    replaced.attribute(module, "new", 1)
    replaced.at_end(Once(IndexError))
    replaced.attribute(module, "later", 2)
    with pytest.raises(IndexError), replaced, replaced:
        pass
    assert vars(module) == kept


@pytest.mark.parametrize(("errors", "called"), [([], ["end"]), ([IndexError], ["taken back", "end"])])
def test_what_is_taken_back_after_an_error_only(errors, called):
    calls, replaced = [], Replacements()
    replaced.if_cut_short(lambda: calls.append("taken back"))
    replaced.at_end(lambda: calls.append("end"))
    with suppress(IndexError), replaced, replaced:
        fail(errors)
    assert calls == called


def fail(errors):
    for error in errors:
        raise error


def leave_open():
    torch.set_grad_enabled(False)
    TorchFunctionMode().__enter__()
    TorchDispatchMode().__enter__()
    raise IndexError


def test_modes_that_an_error_has_left_open():
    before = torch.is_grad_enabled()
    with pytest.raises(IndexError), Replacements():
        leave_open()
    assert torch.is_grad_enabled() == before
    assert not _get_current_function_mode_stack()
    assert not _get_current_dispatch_mode_stack()
