import pytest
import torch
from spikingjelly.activation_based import surrogate as framework

from sltt_ext.errors import ConfigurationError
from sltt_ext.spikingjelly.surrogates import known_surrogate
from sltt_ext.surrogate import SURROGATES, Surrogate, derivative

FUNCTIONS = [
    framework.Sigmoid(alpha=4.0),
    framework.Sigmoid(alpha=1.7),
    framework.ATan(alpha=2.0),
    framework.ATan(alpha=3.1),
    framework.PiecewiseQuadratic(alpha=1.0),
    framework.PiecewiseQuadratic(alpha=1.6),
    framework.PiecewiseExp(alpha=1.3),
    framework.SoftSign(alpha=2.4),
    framework.Erf(alpha=1.9),
    framework.LeakyKReLU(leak=0.1, k=1.2),
    *([framework.Rect(alpha=0.8)] if hasattr(framework, "Rect") else []),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_derivative_is_the_frameworks(function):
    u = torch.linspace(-3, 3, 1001, dtype=torch.float64, requires_grad=True)
    function(u).sum().backward()
    row = known_surrogate(function)
    torch.testing.assert_close(
        derivative(u.detach().clone(), row.name, row.parameters), u.grad, rtol=1e-12, atol=1e-12
    )
    scaled = derivative(u.detach().clone(), row.name, row.parameters, scale=0.3)
    torch.testing.assert_close(scaled, 0.3 * u.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not hasattr(framework, "Rect"), reason="0.0.0.0.14 lacks Rect")
def test_every_row_of_spikingjellys_is_checked_above():
    of_snntorch = {"fast_sigmoid", "sparse_fast_sigmoid", "spike_rate_escape", "leaky_spike", "logistic"}
    assert {known_surrogate(function).name for function in FUNCTIONS} == set(SURROGATES) - of_snntorch


class Subclass(framework.Sigmoid):
    pass


@pytest.mark.parametrize(
    "function",
    [
        Subclass(),
        framework.Sigmoid(spiking=False),
        framework.ATan(alpha=torch.tensor(2.0)),
        framework.S2NN(),
        framework.heaviside,
        lambda x: x,
    ],
)
def test_what_may_compute_anything_is_not_known(function):
    assert known_surrogate(function) is None


def test_unknown_name_and_wrong_number_of_parameters():
    with pytest.raises(ConfigurationError, match="known are sigmoid"):
        Surrogate("sigmoids", (4.0,))
    with pytest.raises(ConfigurationError, match=r"takes \(leak, k\)"):
        Surrogate("leaky_k_relu", (4.0,))
