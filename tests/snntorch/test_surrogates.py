import pytest
import torch
from snntorch import surrogate as framework

from sltt_ext.snntorch.surrogates import known_surrogate
from sltt_ext.surrogate import derivative

FUNCTIONS = {
    "atan": framework.atan(),
    "atan, alpha 1": framework.atan(alpha=1),
    "fast_sigmoid": framework.fast_sigmoid(),
    "fast_sigmoid, slope 3.5": framework.fast_sigmoid(slope=3.5),
    "sigmoid": framework.sigmoid(slope=25),
    "triangular": framework.triangular(threshold=0.7),
    "straight_through_estimator": framework.straight_through_estimator(),
    "heaviside": framework.heaviside(),
    "SFS": framework.SFS(slope=3, B=0.5),
    "spike_rate_escape": framework.spike_rate_escape(beta=1.5, slope=2),
}
SNNTORCH_ROWS = {"fast_sigmoid", "sparse_fast_sigmoid", "spike_rate_escape", "leaky_spike"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivative_is_the_frameworks(name):
    u = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    u[500] = 0  # exactly at the threshold
    u.requires_grad_()
    function = FUNCTIONS[name]
    function(u).sum().backward()
    row = known_surrogate(function)
    for scale in (1.0, 0.3):
        actual = derivative(u.detach().clone(), row.name, row.parameters, scale=scale)
        torch.testing.assert_close(actual, scale * u.grad, rtol=1e-7, atol=1e-12)


def test_every_row_that_only_snntorch_uses_is_checked_above():
    checked = {known_surrogate(function).name for function in FUNCTIONS.values()}
    assert checked >= SNNTORCH_ROWS


def test_where_snntorchs_sigmoid_overflows():
    u = torch.tensor([-4.0, -1.0], requires_grad=True)
    framework.sigmoid(slope=25)(u).sum().backward()
    actual = derivative(u.detach().clone(), "logistic", (25.0,))
    assert u.grad[0].isnan()
    assert actual[0] == 0
    torch.testing.assert_close(actual[1], u.grad[1], rtol=1e-5, atol=0)


def imitation():
    slope = 25

    def inner(x):
        return framework.FastSigmoid.apply(x, slope)

    inner.__qualname__ = "fast_sigmoid.<locals>.inner"
    return inner


@pytest.mark.parametrize(
    "function",
    [
        imitation(),
        framework.SSO(),
        framework.LSO(),
        framework.atan(alpha=torch.tensor(2.0)),
        framework.custom_surrogate(lambda u, grad, spikes: grad),
        lambda x: x,
        torch.nn.Identity(),
    ],
    ids=["imitation", "SSO", "LSO", "tensor", "custom", "lambda", "module"],
)
def test_what_may_compute_anything_is_not_known(function):
    assert known_surrogate(function) is None


def test_lso_does_not_run_in_snntorch_itself():
    with pytest.raises(TypeError, match="variance"):
        framework.LSO()(torch.zeros(3))
