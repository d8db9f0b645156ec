"""The CUDA source of the fused neuron, run on the CPU, against the torch backend.

In float32 everything is equal bit for bit, but for the derivatives of surrogates with an exponential: the C
library's and PyTorch's differ in the last place, which is 1e-6 of the largest derivative at most. In half
precision derivatives are within one rounding.
"""

import itertools
import math

import host
import products
import pytest
import torch
import variants
from hypothesis import given, settings
from hypothesis import strategies as st

from sltt_ext.functional import multi_step_if, multi_step_lif, multi_step_plif
from sltt_ext.functional.lif_operator import lif_settings
from sltt_ext.functional.schema import flat
from sltt_ext.kernels import cuda_lif, geometry, torch_lif
from sltt_ext.kernels.lif import LIFSettings
from sltt_ext.surrogate import SURROGATES, Surrogate, derivative

PARAMETERS = {
    "sigmoid": (4.0,),
    "leaky_k_relu": (0.1, 1.3),
    "sparse_fast_sigmoid": (5.0, -0.3),
    "spike_rate_escape": (1.2, 0.8),
}
EXPONENTIAL = {"sigmoid", "logistic", "piecewise_exp", "erf", "spike_rate_escape"}
KINDS = {  # decay, tau, decay_input
    "if": (None, None, False),
    "lif": (None, 1.7, True),
    "lif, not decay_input": (None, 1.7, False),
    "plif": (0.4, None, True),
    "plif, not decay_input": (0.4, None, False),
    "lif, factored leak": (None, 1.7, False),
    "plif, factored leak": (0.4, None, False),
}
ELEMENTS = {8: 2080, 4: 1036, 2: 42, 1: 37}
ON_HOST = host.LIF_ON_HOST


@pytest.fixture(autouse=True)
def _wide_loads_in_small_tensors(monkeypatch):
    monkeypatch.setattr(geometry, "_ENOUGH_THREADS", 0)


def arguments(kind, surrogate, v_reset, detach_reset):
    decay, tau, decay_input = KINDS[kind]
    decay = None if decay is None else torch.tensor(decay)
    factored_leak = kind.endswith("factored leak")
    settings = LIFSettings(
        tau, decay_input, factored_leak, 0.9, v_reset, detach_reset, False, False, row(surrogate)
    )
    return decay, settings


def row(surrogate):
    return Surrogate(surrogate, PARAMETERS.get(surrogate, (1.3,)))


def assert_same_kind(got, want):
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())


def assert_derivatives_match(got, want, surrogate):
    assert_same_kind(got, want)
    eps = torch.finfo(want.dtype).eps
    if want.dtype != torch.float32:
        torch.testing.assert_close(got, want, rtol=eps, atol=1e-7, equal_nan=True)
    elif surrogate in EXPONENTIAL and want.numel():
        largest = want.nan_to_num(0, 0, 0).abs().max().item()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * largest, equal_nan=True)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def compare(x_seq, v, decay, settings, grad_s, grad_v):
    """Forward and backward on both backends, with everything that may be kept or missing."""
    kept = {(False, False), (True, False), (True, decay is not None)}
    for (save, save_slope), charged in itertools.product(kept, (False, True)):
        settings = settings._replace(charged=charged)
        want = torch_lif.forward(x_seq, v, decay, settings, save, save_slope)
        assert_outputs_match(ON_HOST.forward(x_seq, v, decay, settings, save, save_slope), want, settings)
        if charged:
            for kernels in (torch_lif, ON_HOST):
                held = v.clone(memory_format=torch.preserve_format)
                got = kernels.forward(x_seq, held, decay, settings, save, save_slope, overwrite=True)
                assert got[1] is held
                assert_outputs_match(got, want, settings)
        if not save:
            continue
        saved = want[2], want[1] if charged else want[3], want[4]
        for grads in ((grad_s, grad_v), (grad_s, None), (None, grad_v)):
            want_grad, want_decay = torch_lif.backward(*grads, *saved, decay, settings)
            got_grad, got_decay = ON_HOST.backward(*grads, *saved, decay, settings)
            assert_derivatives_match(got_grad, want_grad, settings.surrogate.name)
            assert_same_kind(got_decay, want_decay)
            terms = want_grad.float().abs().nan_to_num(0, 0, 0).sum().item() if save_slope else 0
            torch.testing.assert_close(got_decay, want_decay, rtol=1e-6, atol=1e-6 * terms, equal_nan=True)
    compare_through_time(x_seq, v, decay, settings._replace(charged=False, through_time=True), grad_s, grad_v)


def compare_through_time(x_seq, v, decay, settings, grad_s, grad_v):
    """The same of the gradient through time."""
    for save_slope in {False, decay is not None}:
        want = torch_lif.forward(x_seq, v, decay, settings, True, save_slope)
        assert_outputs_match(ON_HOST.forward(x_seq, v, decay, settings, True, save_slope), want, settings)
        for grads in ((grad_s, grad_v), (grad_s, None), (None, grad_v)):
            given = (*grads, want[3], want[4], decay, settings)
            want_grads = torch_lif.backward_through_time(*given)
            got_grads = ON_HOST.backward_through_time(*given)
            for k in (0, 2):
                assert_derivatives_match(got_grads[k], want_grads[k], settings.surrogate.name)
            assert_same_kind(got_grads[1], want_grads[1])
            terms = (want_grads[0].float() * want[4]).abs().nan_to_num(0, 0, 0).sum() if save_slope else 0
            torch.testing.assert_close(
                got_grads[1], want_grads[1], rtol=1e-6, atol=1e-5 * float(terms), equal_nan=True
            )


def assert_outputs_match(got, want, settings):
    assert_derivatives_match(got[2], want[2], settings.surrogate.name)
    for k in (0, 1, 3, 4):
        assert_same_kind(got[k], want[k])
        torch.testing.assert_close(got[k], want[k], rtol=0, atol=0, equal_nan=True)


def compare_random(kind, dtype, surrogate, shape, v_reset, detach_reset):
    x_seq, grad_s = (2 * torch.randn(2, *shape)).to(dtype)
    v, grad_v = torch.randn(2, *shape[1:])
    compare(x_seq, v, *arguments(kind, surrogate, v_reset, detach_reset), grad_s, grad_v)


@pytest.mark.parametrize(("surrogate", "dtype"), products.spread(SURROGATES, variants.DTYPES))
def test_every_variant_at_full_width(surrogate, dtype):
    width = variants.widths(dtype)[0]
    for kind, (v_reset, detach_reset) in itertools.product(KINDS, [(None, False), (-0.2, True)]):
        compare_random(kind, dtype, surrogate, (3, ELEMENTS[width]), v_reset, detach_reset)


@pytest.mark.parametrize(
    ("dtype", "width"), [(d, w) for d in variants.DTYPES for w in variants.widths(d)[1:]], ids=str
)
def test_every_variant_at_other_widths(dtype, width):
    for kind, v_reset, detach_reset in itertools.product(KINDS, [None, 0.0], variants.BOTH):
        compare_random(kind, dtype, "atan", (3, ELEMENTS[width]), v_reset, detach_reset)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from(variants.DTYPES),
    time_steps=st.integers(1, 7),
    elements=st.one_of(st.integers(1, 80), st.integers(250, 280).map(lambda k: 8 * k)),
    v_reset=st.sampled_from([None, 0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_any_size(kind, dtype, time_steps, elements, v_reset, seed):
    torch.manual_seed(seed)
    compare_random(kind, dtype, "atan", (time_steps, elements), v_reset, False)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_cuda_expression_of_a_surrogate_is_its_torch_expression(surrogate):
    edges = [
        0.0,
        -0.0,
        -0.3,
        1 / 1.3,
        0.5 / 1.3,
        -0.5 / 1.3,
        1.0,
        1e-30,
        -1e30,
        1e30,
        math.inf,
        -math.inf,
        math.nan,
    ]
    u = torch.cat([torch.linspace(-30, 30, 20003), torch.randn(20000), torch.tensor(edges)])
    want = derivative(u.clone(), surrogate, row(surrogate).parameters)
    settings = lif_settings(v_threshold=0.0, v_reset=None, detach_reset=False, surrogate=row(surrogate))
    got = ON_HOST.forward(u.repeat(2, 1), torch.zeros_like(u), None, settings, True, False)[2][0]
    assert_derivatives_match(got, want, surrogate)


def test_whole_numbers_are_numbers(monkeypatch):
    """An integer that reached a kernel would be read as the bits of a float."""
    host.register(monkeypatch)
    results = []
    for backend, number in (("torch", float), ("cupy", int)):
        x_seq = torch.linspace(-2, 4, 111).view(3, 37).requires_grad_()
        s_seq, v = multi_step_lif(
            x_seq, number(1), tau=number(2), v_threshold=number(1), v_reset=number(0),
            surrogate=Surrogate("sparse_fast_sigmoid", (number(5), number(-1))), backend=backend,
        )  # fmt: skip
        (s_seq.sum() + v.sum()).backward()
        results.append([s_seq, v, x_seq.grad])
    assert results[0][2].count_nonzero() > 0
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("v_reset", [None, 0.0])
def test_potentials_at_the_threshold_and_beyond_all_numbers(kind, v_reset):
    values = torch.tensor([0.9, -0.0, 0.0, math.inf, -math.inf, math.nan, 3e38, 1e-44, 0.5])
    x_seq, v = values.expand(9, 9).reshape(1, 81).repeat(3, 1), values.repeat_interleave(9)
    compare(x_seq, v, *arguments(kind, "atan", v_reset, False), torch.ones(3, 81), torch.ones(81))


def layouts():
    base = torch.randn(3, 4, 6, 8, 2)
    return {
        "contiguous": base,
        "channels_last": base.permute(0, 1, 4, 2, 3),
        "transposed": base.transpose(1, 3),
        "time_inside": base.movedim(0, 1).contiguous().movedim(1, 0),
        "batch_first": base.transpose(0, 1),
        "strided": torch.randn(6, 4, 12)[::2, :, ::3],
        "repeated_over_time": torch.randn(4, 6).expand(3, 4, 6),
        "repeated_over_a_channel": torch.randn(3, 4, 1, 8).expand(3, 4, 6, 8),
        "misaligned": torch.randn(3 * 4 * 8 + 1)[1:].view(3, 4, 8),
        "one_step": torch.randn(1, 4, 6, 2).permute(0, 3, 1, 2),
    }


@pytest.mark.parametrize("of_v", ["as x", "contiguous", "reversed"])
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_memory_layout(layout, of_v, dtype):
    x_seq = layouts()[layout].to(dtype)
    v = torch.randn_like(x_seq[0], dtype=torch.float32)
    if of_v != "as x":
        v = v.contiguous() if of_v == "contiguous" else v.mT.contiguous().mT
    for grad_s, grad_v in (
        (torch.randn_like(x_seq), torch.randn_like(v)),
        (torch.randn(x_seq.shape).to(dtype), torch.ones(()).expand(v.shape)),
        (torch.ones((), dtype=dtype).expand(x_seq.shape), torch.randn_like(v)),
    ):
        compare(x_seq, v, *arguments("plif", "atan", None, False), grad_s, grad_v)


@pytest.mark.parametrize("dtype", variants.DTYPES, ids=str)
def test_channels_last_is_walked_without_copies(dtype, monkeypatch):
    x_seq = torch.randn(3, 4, 6, 8, 2).to(dtype).permute(0, 1, 4, 2, 3)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda tensor: pytest.fail("a copy was made"))
    settings = arguments("lif", "atan", None, False)
    outputs = ON_HOST.forward(x_seq, torch.zeros_like(x_seq[0], dtype=torch.float32), *settings, True, False)
    ON_HOST.backward(torch.ones_like(x_seq), None, *outputs[2:], *settings)


@pytest.mark.parametrize("layout", layouts())
def test_one_number_as_initial_state(layout):
    x_seq, settings = layouts()[layout], arguments("lif", "atan", -0.2, False)
    v = torch.full_like(x_seq[0], -0.2)
    for save in variants.BOTH:
        want = torch_lif.forward(x_seq, v, *settings, save, False)
        for got, expected in zip(ON_HOST.forward(x_seq, -0.2, *settings, save, False), want):
            assert_same_kind(got, expected)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(3, 0), (1, 0, 4), (2, 5, 0)])
def test_no_elements(shape):
    compare_random("if", torch.float32, "atan", shape, None, False)


def test_any_number_of_blocks_does():
    def with_few_blocks(kernel, blocks, arguments, device):
        assert blocks > 2
        host.launch(kernel, 2, arguments, device)

    x_seq, v, settings = torch.randn(3, 4000), torch.randn(4000), arguments("lif", "atan", None, False)
    want = torch_lif.forward(x_seq, v, *settings, True, False)
    got = cuda_lif.forward(x_seq, v, *settings, True, False, launch=with_few_blocks)
    assert all(torch.equal(*pair) for pair in zip(got, want))
    grads = torch.randn(3, 4000), torch.randn(4000)
    want = torch_lif.backward(*grads, *want[2:], *settings)
    assert torch.equal(cuda_lif.backward(*grads, *got[2:], *settings, launch=with_few_blocks)[0], want[0])


@pytest.mark.parametrize("most", [1, 3])
def test_sums_over_many_blocks(most, monkeypatch):
    monkeypatch.setattr(cuda_lif, "MAX_PARTIAL_SUMS", most)
    for kind in ("plif", "plif, not decay_input"):
        compare_random(kind, torch.float32, "atan", (3, 5000), 0.0, False)


def test_sums_do_not_change_from_run_to_run():
    x_seq, v, settings = torch.randn(3, 5000), torch.randn(5000), arguments("plif", "atan", None, False)
    saved = ON_HOST.forward(x_seq, v, *settings, True, True)[2:]
    grad_s = torch.randn(3, 5000)
    sums = [ON_HOST.backward(grad_s, None, *saved, *settings)[1] for _ in range(3)]
    assert sums[0] == sums[1] == sums[2]


def run(kind, x, w, **options):
    if kind == "if":
        return multi_step_if(x, 0.1, v_reset=None, **options)
    if kind == "lif":
        return multi_step_lif(x, 0.1, tau=1.7, **options)
    return multi_step_plif(x, w, 0.1, **options)


@pytest.mark.parametrize("kind", ["if", "lif", "plif"])
@pytest.mark.parametrize("single_step", [False, True])
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_through_the_public_functions(kind, single_step, way, monkeypatch):
    def loss(x, w, backend):
        s, v = run(kind, x, w, single_step=single_step, backend=backend)
        return (s * x.detach()).sum() + v.sum(), s, v

    host.register(monkeypatch)
    results = []
    for backend in ("torch", "cupy"):
        torch._dynamo.reset()
        call = loss if way == "eager" else torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.manual_seed(0)
        x, w = torch.randn(3, 44, requires_grad=True), torch.tensor(0.1, requires_grad=True)
        total, s, v = call(x, w, backend)
        total.backward()
        results.append([s.detach(), v.detach(), x.grad, *([w.grad] if kind == "plif" else [])])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time_steps", [1, 3])
def test_opcheck(kind, time_steps, monkeypatch):
    host.register(monkeypatch)
    decay, settings = arguments(kind, "atan", None, False)
    x_seq = torch.randn(time_steps, 2, 3, 4).transpose(1, 2).requires_grad_()
    v = torch.randn(2, 3, 4).transpose(0, 1)
    decay = None if decay is None else decay.requires_grad_()
    for start in (v, None):
        given = (x_seq, start, 0.2, decay, *flat(settings), True, decay is not None, "cupy")
        torch.library.opcheck(torch.ops.sltt_ext.lif.default, given)


def test_a_state_that_a_kernel_overwrites_is_known_to_have_changed(monkeypatch):
    """A kernel writes where autograd does not look."""
    host.register(monkeypatch)
    options = {"charged": True, "backend": "cupy"}
    x_seq = torch.randn(2, 40, requires_grad=True)
    _, h = multi_step_lif(x_seq, **options)
    s_seq, h = multi_step_lif(x_seq, h.detach(), **options)
    multi_step_lif(x_seq, h.detach(), **options)
    with pytest.raises(RuntimeError, match="inplace operation"):
        s_seq.sum().backward()
