"""Standardised weights are those of the published formula, and so are their gradients."""

import pytest
import torch

from sltt_ext.models.standardisation import EPSILON, ScaledWeightStandardisation, SkipGain, standardised_conv

SHAPES = [(8, 3, 7, 7), (6, 16, 3, 3), (16, 4, 1, 1), (1, 5, 3, 3), (4, 6, 1, 1)]


def published(weight, gain, scale, skip):
    """The formula as it is written."""
    mean = weight.mean((1, 2, 3), keepdim=True)
    fan_in = weight[0].numel()
    variance = (weight - mean).square().sum((1, 2, 3), keepdim=True) / (fan_in - 1)
    standard = gain * (weight - mean) / torch.sqrt(variance * fan_in + EPSILON) * scale
    return standard if skip is None else standard * (skip.alpha * skip.gain)


def setting(shape, spread, with_skip, dtype):
    torch.manual_seed(0)
    skip = SkipGain(0.2) if with_skip else None
    standardised = ScaledWeightStandardisation(shape[0], 2.74, skip)
    torch.nn.init.uniform_(standardised.gain, 0.5, 2)
    if skip is not None:
        torch.nn.init.constant_(skip.gain, 0.7)
    weight = spread * torch.randn(shape, dtype=torch.float64) + 0.3 * spread
    downstream = torch.randn(shape) + weight / spread  # no sum of it is much smaller than what is summed
    return standardised.to(dtype), weight.to(dtype).requires_grad_(), downstream.to(dtype)


def errors(found, expected):
    return [
        float((one.double() - other.double()).norm() / other.double().norm())
        for one, other in zip(found, expected, strict=True)
    ]


def both(standardised, weight, downstream, dtype):
    """Weight and gradients, as computed and by the formula in float64."""
    leaves = [weight, *standardised.parameters()]
    output = standardised(weight)
    found = [output, *torch.autograd.grad(output, leaves, downstream)]
    exact = standardised.double()
    leaves = [weight.detach().double().requires_grad_(), *exact.parameters()]
    formula = published(leaves[0], exact.gain, exact.scale, exact.skip)
    return found, [formula, *torch.autograd.grad(formula, leaves, downstream.double())]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_gradients_are_those_of_the_formula(shape, with_skip, channels_last, dtype, bound):
    standardised, weight, downstream = setting(shape, 0.3, with_skip, dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight = weight.detach().to(memory_format=layout).requires_grad_()
    found, expected = both(standardised, weight, downstream, dtype)
    assert max(errors(found, expected)) < bound
    assert all(tensor.is_contiguous(memory_format=layout) for tensor in found[:2])


@pytest.mark.parametrize("spread", [1e-3, 1e-2, 30.0])
def test_the_constant_in_the_root_counts_as_in_the_formula(spread):
    standardised, weight, downstream = setting((6, 16, 3, 3), spread, True, torch.float64)
    assert max(errors(*both(standardised, weight, downstream, torch.float64))) < 1e-12


def test_two_inputs():
    standardised, weight, downstream = setting((4, 2, 1, 1), 0.3, True, torch.float64)
    assert max(errors(*both(standardised, weight, downstream, torch.float64))) < 1e-12


def test_half_precision():
    standardised, weight, downstream = setting((6, 16, 3, 3), 0.3, True, torch.bfloat16)
    found, expected = both(standardised, weight, downstream, torch.bfloat16)
    assert found[0].dtype == torch.bfloat16
    assert max(errors(found, expected)) < 2e-2


def test_gradients_can_be_differentiated_again():
    standardised, weight, _ = setting((3, 2, 2, 2), 0.3, True, torch.float64)
    assert torch.autograd.gradgradcheck(standardised, weight)


def test_names_of_the_parameters():
    conv = standardised_conv(3, 4, 3, skip=SkipGain(0.2))
    assert set(conv.state_dict()) == {
        "parametrizations.weight.original",
        "parametrizations.weight.0.gain",
        "parametrizations.weight.0.skip.gain",
        "parametrizations.bias.original",
        "parametrizations.bias.0.gain",
    }
