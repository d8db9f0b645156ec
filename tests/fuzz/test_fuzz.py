"""Random networks and options against an oracle that knows nothing of the library."""

import pytest
import torch
from fuzz import description, library
from fuzz.check import shrunk, verdict
from fuzz.generator import random_case
from fuzz.run import script

CASES, PARTS = 200, 10  # of each framework


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("framework", ["spikingjelly", "snntorch"])
def test_gradients_are_right_whatever_the_speed_ups(framework, part):
    right = 0
    for seed in range(part, CASES, PARTS):
        case = random_case(framework, seed)
        found = verdict(case)
        right += found.kind == "right"
        if found.is_fault:
            small = shrunk(case, found)
            pytest.fail(f"seed {seed}: {verdict(small).reason}\n{script(small)}")
    assert right > 0.7 * CASES / PARTS


@pytest.mark.parametrize("framework", ["spikingjelly", "snntorch"])
def test_a_case_prints_as_what_rebuilds_it(framework):
    cases = [random_case(framework, seed) for seed in range(200)]
    assert [eval(repr(case), vars(description)) for case in cases] == cases
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize("way", description.WAYS)
def test_a_wrong_gradient_is_found_and_shrunk(monkeypatch, way):
    monkeypatch.setattr(library, "backward", lambda case, net: lambda loss: (1.01 * loss).backward())
    blocks = (
        description.Block("weight", hook="observe"),
        description.Block("norm"),
        description.Block("neuron"),
    )
    options = description.Options(way)
    case = description.Case("spikingjelly", 0, blocks, batch=4, iterations=2, options=options)
    found = verdict(case)
    assert found.kind == "plain fault"
    assert shrunk(case, found).blocks == (description.Block("neuron"),)
