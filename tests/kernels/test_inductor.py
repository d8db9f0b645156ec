"""The compiled backend against the torch backend."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sltt_ext.analysis import ActivationMeter
from sltt_ext.errors import BackendError
from sltt_ext.functional import multi_step_if, multi_step_leaky, multi_step_lif, multi_step_plif
from sltt_ext.kernels import inductor
from sltt_ext.surrogate import SURROGATES, Surrogate

pytestmark = pytest.mark.slow  # torch.compile compiles for seconds a case

PARAMETERS = {
    "leaky_k_relu": (0.1, 1.3),
    "sparse_fast_sigmoid": (5.0, -0.3),
    "spike_rate_escape": (1.2, 0.8),
}


def call(kind, x_seq, v, w, **options):
    if kind == "if":
        return multi_step_if(x_seq, v, **options)
    options["decay_input"] = "decay_input" in kind
    options["factored_leak"] = "factored" in kind
    if kind.startswith("lif"):
        return multi_step_lif(x_seq, v, tau=1.7, **options)
    return multi_step_plif(x_seq, w, v, **options)


def run(backend, kind, x_seq, v=0.1, **options):
    """Spikes, state and gradients; the loss reads the state as well."""
    x_seq, w = x_seq.detach().requires_grad_(), torch.tensor(0.3, requires_grad=True)
    through_time = options.get("through_time", False)
    if isinstance(v, torch.Tensor):
        v = v.clone().requires_grad_(through_time)  # a charged one is overwritten
    s_seq, v_next = call(kind, x_seq, v, w, backend=backend, **options)
    weight = torch.linspace(-1, 1, x_seq.numel()).view(x_seq.shape).to(x_seq.dtype)
    (
        (s_seq * weight).sum() + (v_next * weight.flatten()[: v_next.numel()].view(v_next.shape)).sum()
    ).backward()
    gradients = [x_seq.grad] if w.grad is None else [x_seq.grad, w.grad]
    if through_time and isinstance(v, torch.Tensor):
        gradients.append(v.grad)
    return [s_seq.detach(), v_next.detach(), *gradients]


def compare(kind, x_seq, v=0.1, **options):
    want, got = (run(backend, kind, x_seq, v, **options) for backend in ("torch", "inductor"))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert [(t.dtype, t.stride()) for t in got] == [(t.dtype, t.stride()) for t in want]
    eps = max(1e-6, 2 * torch.finfo(x_seq.dtype).eps) if x_seq.dtype != torch.float64 else 1e-12
    for gradient, expected in zip(got[2:], want[2:], strict=True):
        largest = max([1.0, *expected.abs().flatten().tolist()])
        torch.testing.assert_close(gradient, expected, rtol=eps, atol=eps * largest)


@pytest.mark.parametrize(
    ("kind", "v_reset", "time_steps"),
    [
        ("if", None, 3),
        ("if", 0.25, 1),
        ("lif", None, 1),
        ("lif", 0.25, 3),
        ("lif decay_input", 0.0, 3),
        ("lif factored", None, 3),
        ("plif", 0.25, 3),
        ("plif decay_input", None, 1),
        ("plif decay_input", 0.0, 3),
        ("plif factored", 0.0, 3),
    ],
)
@pytest.mark.parametrize("through_time", [False, True])
def test_every_neuron(kind, v_reset, time_steps, through_time):
    x_seq, v = 2 * torch.randn(time_steps, 4, 37), torch.randn(4, 37)
    compare(kind, x_seq, v, v_reset=v_reset, through_time=through_time)


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate(name):
    surrogate = Surrogate(name, PARAMETERS.get(name, (1.3,)))
    compare("lif decay_input", 2 * torch.randn(2, 50), surrogate=surrogate, detach_reset=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["lif", "plif decay_input"])
@pytest.mark.parametrize("through_time", [False, True])
def test_dtypes(kind, dtype, through_time):
    compare(kind, (2 * torch.randn(3, 100)).to(dtype), through_time=through_time)


def test_charged():
    compare("lif", 2 * torch.randn(3, 100), torch.randn(100), v_reset=None, charged=True)


def test_layouts_and_sizes_compile_nothing_new():
    base = 2 * torch.randn(3, 4, 6, 8, 2)
    layouts = [
        base,
        base.permute(0, 1, 4, 2, 3),
        base.transpose(0, 1)[:3],
        base[..., ::2],
        base[:1].expand_as(base),
    ]
    for through_time in (False, True):
        compare("lif", layouts[0], through_time=through_time)
    before = len(inductor._COMPILED)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x_seq, through_time in itertools.product(layouts, (False, True)):
            compare("lif", x_seq, through_time=through_time)
    assert len(inductor._COMPILED) == before


@pytest.mark.parametrize("shape", [(2, 0), (2, 1), (1, 1, 1)])
def test_hardly_any_elements(shape):
    compare("lif", torch.randn(shape))
    compare("lif", torch.randn(shape), through_time=True)


def test_inside_autocast_and_no_grad():
    layer, x = torch.nn.Linear(8, 8), torch.randn(3, 5, 8)
    results = []
    for backend in ("torch", "inductor"):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            results.append(multi_step_lif(layer(x), backend=backend))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_inside_a_compiled_network():
    def loss(x_seq):
        s_seq, v = multi_step_lif(x_seq, backend="inductor")
        return (s_seq * x_seq.detach()).sum() + v.sum()

    gradients = []
    for way in (loss, torch.compile(loss, fullgraph=True)):
        x_seq = torch.linspace(-1, 3, 60).view(3, 20).requires_grad_()
        way(x_seq).backward()
        gradients.append(x_seq.grad)
    torch.testing.assert_close(*gradients)


def test_counting_its_memory():
    with ActivationMeter() as meter:
        s_seq, v = multi_step_if(torch.ones(2, 33), v_threshold=3.0, backend="inductor")
    assert meter.live_bytes >= s_seq.nbytes + v.nbytes


def test_fake_tensors_run_nothing():
    with FakeTensorMode():
        s_seq, v = multi_step_lif(torch.empty(3, 4), backend="inductor")
    assert (s_seq.shape, v.shape) == ((3, 4), (4,))


def test_leaky_is_refused():
    with pytest.raises(BackendError, match="does not run snnTorch's Leaky"):
        multi_step_leaky(torch.ones(2, 3), beta=0.9, backend="inductor")


def test_without_a_compiler(tmp_path):
    code = (
        "import torch\nfrom sltt_ext import functional, kernels\nfrom sltt_ext.errors import BackendError\n"
        "for call in (lambda: kernels.check_backend('inductor'),"
        " lambda: functional.multi_step_lif(torch.ones(2, 30), backend='inductor')):\n"
        "    try:\n        call()\n    except BackendError as error:\n        print(error)\n"
    )
    environment = os.environ | {"CXX": str(tmp_path / "absent"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    messages = [
        line for line in done.stdout.splitlines() if line.startswith("backend='inductor' cannot be used")
    ]
    assert len(messages) == 2
    assert all("install a C++ compiler" in message for message in messages)
