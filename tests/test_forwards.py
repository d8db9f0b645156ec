"""Replacing what modules do, for a while: order, restoring, and who else replaces something."""

import pytest
from torch import nn

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


def test_an_interrupt_while_putting_back():
    module, interrupts = Named(), [KeyboardInterrupt]

    class Interrupted(dict):
        def pop(self, name, *default):
            if interrupts:
                raise interrupts.pop()
            return super().pop(name, *default)

    replaced = Replacements()
    replaced.attribute(module, "new", 1)
    replaced.forward(module, Layer.OWN, says("layer"))
    replaced._undo[0] = replaced._undo[0].__class__(
        replaced._undo[0].func, Interrupted(), *replaced._undo[0].args[1:]
    )
    replaced.attribute(module, "later", 2)
    with pytest.raises(KeyboardInterrupt):
        replaced.undo()
    assert not replaced._undo
    assert "forward" not in vars(module)
    assert not hasattr(module, "later")
