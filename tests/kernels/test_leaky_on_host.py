"""The CUDA source of snnTorch's Leaky neuron, run on the CPU, against the torch backend; see test_lif_on_host.py."""

import itertools
import math

import host
import products
import pytest
import torch
import variants
from hypothesis import given, settings
from hypothesis import strategies as st

from sltt_ext.functional import multi_step_leaky
from sltt_ext.functional.leaky_operator import leaky_settings
from sltt_ext.kernels import cuda_leaky, geometry, torch_leaky
from sltt_ext.surrogate import SURROGATES, Surrogate

PARAMETERS = {
    "sigmoid": (4.0,),
    "leaky_k_relu": (0.1, 1.3),
    "sparse_fast_sigmoid": (5.0, -0.3),
    "spike_rate_escape": (1.2, 0.8),
}
EXPONENTIAL = {"sigmoid", "logistic", "piecewise_exp", "erf", "spike_rate_escape"}
RESETS = ["subtract", "zero", "none"]
STEP = (3, 4, 6)
SHAPES = [(), (1,), (6,), (4, 6), (4, 1), (3, 1, 1), (3, 4, 6), (3, 1, 6), (1, 4, 1)]
ON_HOST = host.LEAKY_ON_HOST


@pytest.fixture(autouse=True)
def _wide_loads_in_small_tensors(monkeypatch):
    monkeypatch.setattr(geometry, "_ENOUGH_THREADS", 0)


def assert_match(got, want, tolerance=0.0, rtol=0.0):
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    if want.numel():
        torch.testing.assert_close(got, want, rtol=rtol, atol=tolerance, equal_nan=True)


def compare(
    x_seq,
    mem,
    beta,
    threshold,
    reset_mechanism,
    reset_delay,
    surrogate="atan",
    grad_s=None,
    all_kept=False,
):
    """Forward and backward on both backends, with everything that may be kept or missing, or with all of it."""
    if grad_s is None:
        grad_s = torch.randn_like(x_seq)
    settings = leaky_settings(
        reset_mechanism=reset_mechanism,
        reset_delay=reset_delay,
        surrogate=Surrogate(surrogate, PARAMETERS.get(surrogate, (1.3,))),
    )
    kept = (True,) if all_kept else variants.BOTH
    for return_mem_seq, save in itertools.product(kept, kept):
        given = (x_seq, mem, beta, threshold, settings, return_mem_seq, save)
        want, got = torch_leaky.forward(*given), ON_HOST.forward(*given)
        for pair in zip(got, want):
            assert_match(*pair)
        if not save:
            continue
        h_seq = want[2] if want[2].numel() else want[1]
        grad_mem = torch.randn_like(h_seq if return_mem_seq else h_seq[:1])
        for grads, learn in itertools.product(
            ((grad_s, grad_mem), *(() if all_kept else ((grad_s, None), (None, grad_mem)))),
            ((False, False), (True, True), (True, False), (False, True)),
        ):
            compare_through_time(*grads, h_seq, mem, beta, threshold, settings, learn)
            needed = mem if settings.resets_in_step or any(learn) else None
            learned = beta.shape if learn[0] else None, learn[1]
            given = (*grads, h_seq, needed, threshold, settings, *learned)
            want_grads, got_grads = torch_leaky.backward(*given), ON_HOST.backward(*given)
            magnitudes = [tensor.abs().nan_to_num(0, 0, 0) for tensor in (h_seq, want_grads[0])]
            terms = magnitudes[0].amax().item() * magnitudes[1].sum().item()
            largest = magnitudes[1].amax().item()
            assert_match(got_grads[0], want_grads[0], 1e-6 * largest if surrogate in EXPONENTIAL else 0)
            assert_match(got_grads[1], want_grads[1], 1e-7 * terms, 1e-6)
            assert_match(got_grads[2], want_grads[2], 1e-7 * terms, 1e-6)


def compare_through_time(grad_s, grad_mem, h_seq, mem, beta, threshold, settings, learn):
    """The gradient through time on both backends."""
    settings = settings._replace(through_time=True)
    needs_mem = settings.resets_in_step or any(learn) or settings.reset_mechanism == "zero"
    given = (grad_s, grad_mem, h_seq, mem if needs_mem else None, beta, threshold, settings, *learn)
    want = torch_leaky.backward_through_time(*given)
    got = ON_HOST.backward_through_time(*given)
    exponential = settings.surrogate.name in EXPONENTIAL
    for k in (0, 3):
        largest = want[k].abs().nan_to_num(0, 0, 0).amax().item()
        assert_match(got[k], want[k], 1e-5 * largest if exponential else 0)
    terms = h_seq.abs().nan_to_num(0, 0, 0).amax() * want[0].abs().nan_to_num(0, 0, 0).sum()
    for k in (1, 2):
        assert_match(got[k], want[k], 1e-6 * terms.item(), 1e-5)


def compare_random(dtype, shape, beta_shape, threshold_shape, *settings, **options):
    beta, threshold = 0.5 + 0.5 * torch.rand(beta_shape), 0.4 + torch.rand(threshold_shape)
    compare((2 * torch.randn(shape)).to(dtype), torch.randn(shape[1:]), beta, threshold, *settings, **options)


@pytest.mark.parametrize(("surrogate", "dtype"), products.spread(SURROGATES, variants.DTYPES))
def test_every_variant_at_full_width(surrogate, dtype):
    for reset_mechanism, reset_delay in itertools.product(RESETS, variants.BOTH):
        compare_random(dtype, (3, *STEP), (), (4, 1), reset_mechanism, reset_delay, surrogate)


@pytest.mark.parametrize("elements", [37, 42])
@pytest.mark.parametrize("dtype", variants.DTYPES, ids=str)
def test_every_variant_at_other_widths(dtype, elements):
    for reset_mechanism, reset_delay in itertools.product(RESETS, variants.BOTH):
        compare_random(dtype, (3, elements), (), (), reset_mechanism, reset_delay)


@pytest.mark.parametrize("beta_shape", SHAPES, ids=str)
@pytest.mark.parametrize("threshold_shape", SHAPES, ids=str)
def test_any_shape_of_beta_and_threshold(beta_shape, threshold_shape):
    for reset_mechanism, reset_delay in (("subtract", True), ("zero", False)):
        shapes = (2, *STEP), beta_shape, threshold_shape
        compare_random(torch.float32, *shapes, reset_mechanism, reset_delay, all_kept=True)


@settings(max_examples=30)
@given(
    dtype=st.sampled_from(variants.DTYPES),
    time_steps=st.integers(1, 6),
    batch=st.integers(1, 40),
    features=st.integers(1, 40),
    per_feature=st.booleans(),
    reset_mechanism=st.sampled_from(RESETS),
    reset_delay=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_size(dtype, time_steps, batch, features, per_feature, reset_mechanism, reset_delay, seed):
    torch.manual_seed(seed)
    shape = (features,) if per_feature else ()
    compare_random(dtype, (time_steps, batch, features), shape, shape, reset_mechanism, reset_delay)


def layouts():
    base = torch.randn(3, 4, 6, 8, 2)
    return {
        "channels_last": base.permute(0, 1, 4, 2, 3),
        "transposed": base.transpose(1, 3),
        "batch_first": base.transpose(0, 1),
        "strided": torch.randn(6, 4, 12)[::2, :, ::3],
        "repeated_over_time": torch.randn(4, 6).expand(3, 4, 6),
        "misaligned": torch.randn(3 * 4 * 8 + 1)[1:].view(3, 4, 8),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("per_neuron", [False, True])
@pytest.mark.parametrize("reset_delay", [False, True])
def test_any_memory_layout(layout, per_neuron, reset_delay):
    x_seq = layouts()[layout]
    shape = x_seq.shape[2:] if per_neuron else ()
    beta, threshold = 0.5 + 0.5 * torch.rand(shape), 0.4 + torch.rand(shape)
    for mem, grad_s in (
        (torch.randn_like(x_seq[0]), None),
        (torch.randn_like(x_seq[0]).contiguous(), torch.ones(()).expand(x_seq.shape)),
    ):
        compare(x_seq, mem, beta, threshold, "subtract", reset_delay, grad_s=grad_s)


@pytest.mark.parametrize("most", [1, 3])
def test_sums_over_many_blocks(most, monkeypatch):
    monkeypatch.setattr(cuda_leaky, "MAX_PARTIAL_SUMS", most)
    compare_random(torch.float32, (3, 5000), (), (), "subtract", True)
    compare_random(torch.float32, (3, 50, 100), (), (100,), "zero", False)


@pytest.mark.parametrize("reset_mechanism", RESETS)
@pytest.mark.parametrize("reset_delay", variants.BOTH)
def test_potentials_at_the_threshold_and_beyond_all_numbers(reset_mechanism, reset_delay):
    values = torch.tensor([0.9, -0.0, 0.0, math.inf, -math.inf, math.nan, 3e38, 1e-44, 0.45])
    x_seq, mem = values.expand(9, 9).reshape(1, 81).repeat(3, 1), values.repeat_interleave(9)
    compare(x_seq, mem, torch.tensor(0.5), torch.tensor(0.9), reset_mechanism, reset_delay)


@pytest.mark.parametrize("shape", [(3, 0), (1, 0, 4)])
def test_no_elements(shape):
    x_seq, grad_s = torch.randn(2, *shape)
    settings = leaky_settings(
        reset_mechanism="subtract", reset_delay=True, surrogate=Surrogate("atan", (2.0,))
    )
    mem, beta, threshold = torch.randn(shape[1:]), torch.tensor(0.9), torch.tensor(1.0)
    out = ON_HOST.forward(x_seq, mem, beta, threshold, settings, True, True)
    assert out[1].shape == shape
    grads = ON_HOST.backward(grad_s, None, out[1], mem, threshold, settings, (), True)
    assert [grad.tolist() for grad in grads[1:]] == [0.0, 0.0]


@pytest.mark.parametrize("single_step", [False, True])
@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize(("reset_mechanism", "reset_delay"), [("subtract", True), ("zero", False)])
def test_through_the_public_function(single_step, way, reset_mechanism, reset_delay, monkeypatch):
    def loss(x, beta, threshold, backend):
        s, mem = multi_step_leaky(
            x, 0.3, beta=beta, threshold=threshold, reset_mechanism=reset_mechanism, reset_delay=reset_delay,
            single_step=single_step, backend=backend,
        )  # fmt: skip
        return (s * x.detach()).sum() + mem.sum(), s, mem

    host.register(monkeypatch)
    results = []
    for backend in ("torch", "cupy"):
        torch._dynamo.reset()
        call = loss if way == "eager" else torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.manual_seed(0)
        x = torch.randn(3, 5, 8, requires_grad=True)
        beta, threshold = torch.rand(8, requires_grad=True), torch.tensor(0.7, requires_grad=True)
        total, s, mem = call(x, beta, threshold, backend)
        total.backward()
        results.append([s.detach(), mem.detach(), x.grad, beta.grad, threshold.grad])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
