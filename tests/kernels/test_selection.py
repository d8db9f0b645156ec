import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import sltt_ext
from sltt_ext.errors import BackendError, InputError
from sltt_ext.functional import multi_step_lif
from sltt_ext.kernels import selection
from sltt_ext.kernels.backend import Backend, FusedNeuron
from sltt_ext.kernels.cuda_backend import CupyBackend, NvrtcBackend
from sltt_ext.kernels.leaky import LEAKY
from sltt_ext.kernels.lif import LIF
from sltt_ext.kernels.selection import check_backend

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


CUDA_BACKENDS = CupyBackend, NvrtcBackend


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    selection._warn_once.cache_clear()
    for backend in CUDA_BACKENDS:
        monkeypatch.setattr(backend.launcher, "_problems", {})
    monkeypatch.setattr(selection, "_ENVIRONMENT", "auto")
    yield
    selection._warn_once.cache_clear()


def on_cuda(dtype=torch.float32):
    """What the choice of backend looks at."""
    return SimpleNamespace(is_cuda=True, is_cpu=False, dtype=dtype, device=torch.device("cuda", 0))


def select_backend(backend, x, neuron=LIF):
    return selection.select_backend(backend, neuron, x).name


@pytest.fixture
def problem(monkeypatch):
    """Set what is wrong with each launcher of the CUDA kernels: the same with both, if one thing is told."""

    def set_problem(cupy, nvrtc=0):
        for backend, text in zip(CUDA_BACKENDS, (cupy, cupy if nvrtc == 0 else nvrtc)):
            monkeypatch.setattr(backend.launcher, "problem", lambda index=None, text=text: text)

    return set_problem


def test_auto_on_the_cpu_is_torch_without_a_word(problem):
    problem("CuPy is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend("auto", torch.ones(2)) == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_on_cuda_is_cupy(dtype, problem):
    problem(None)
    assert select_backend("auto", on_cuda(dtype)) == "cupy"
    for backend in ("cupy", "nvrtc", "torch"):
        assert select_backend(backend, on_cuda(dtype)) == backend


def test_auto_without_cupy_is_nvrtc_without_a_word(problem):
    problem("cupy is not installed", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend("auto", on_cuda()) == "nvrtc"


def test_auto_on_cuda_in_float64_is_torch_without_a_word(problem):
    problem(None)
    assert select_backend("auto", on_cuda(torch.float64)) == "torch"


def test_auto_without_both_warns_once_per_cause(problem):
    problem("cupy is not installed: pip install 'sltt-ext[cupy13]'", "NVRTC cannot be loaded")
    told = r"not cupy: .*pip install 'sltt-ext\[cupy13\]'; not nvrtc: NVRTC cannot.*SLTT_BACKEND=torch"
    with pytest.warns(UserWarning, match=told):
        assert select_backend("auto", on_cuda()) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend("auto", on_cuda()) == "torch"
    problem("another cause")
    with pytest.warns(UserWarning, match="another cause"):
        select_backend("auto", on_cuda())


@pytest.mark.parametrize("backend", ["cupy", "nvrtc"])
def test_kernels_by_name_are_never_replaced(backend, problem):
    problem(*("it is not installed" if name == backend else None for name in ("cupy", "nvrtc")))
    refused = f"backend='{backend}' cannot be used: it is not installed"
    with pytest.raises(BackendError, match=refused):
        select_backend(backend, on_cuda())
    with pytest.raises(BackendError, match=refused):
        check_backend(backend)
    problem(None)
    with pytest.raises(BackendError, match=f"backend='{backend}' runs on CUDA tensors, x_seq is on cpu"):
        select_backend(backend, torch.ones(2))
    with pytest.raises(InputError, match=f"backend='{backend}' .*float64"):
        select_backend(backend, on_cuda(torch.float64))


def test_environment_variable_replaces_auto_only(problem, monkeypatch):
    problem(None)
    monkeypatch.setattr(selection, "_ENVIRONMENT", "torch")
    assert select_backend("auto", on_cuda()) == "torch"
    assert select_backend("cupy", on_cuda()) == "cupy"
    monkeypatch.setattr(selection, "_ENVIRONMENT", "cupy")
    assert select_backend("auto", on_cuda()) == "cupy"
    with pytest.raises(BackendError, match="x_seq is on cpu"):
        select_backend("auto", torch.ones(2))
    monkeypatch.setattr(selection, "_ENVIRONMENT", "cuda")
    with pytest.raises(BackendError, match="SLTT_BACKEND is 'cuda'"):
        select_backend("auto", torch.ones(2))
    assert select_backend("torch", torch.ones(2)) == "torch"


def test_a_neuron_that_a_backend_does_not_run(problem, monkeypatch):
    monkeypatch.setattr(
        selection._REGISTERED["inductor"].__class__, "problem", lambda self, device=None: None
    )
    with pytest.raises(BackendError, match="backend='inductor' does not run snnTorch's Leaky: use 'auto'"):
        select_backend("inductor", torch.ones(2), LEAKY)
    with pytest.raises(BackendError, match="does not run snnTorch's Leaky"):
        check_backend("inductor", LEAKY)
    assert check_backend("inductor", LIF) == check_backend("inductor") == "inductor"
    monkeypatch.setattr(selection, "_ENVIRONMENT", "inductor")
    with pytest.raises(BackendError, match="does not run snnTorch's Leaky"):
        check_backend("auto", LEAKY)
    assert check_backend("torch", LEAKY) == "torch"


def test_the_environment_variable_is_checked_for_fused_neurons(problem, monkeypatch):
    problem("cupy is not installed")
    monkeypatch.setattr(selection, "_ENVIRONMENT", "cupy")
    assert check_backend("auto") == "auto"
    with pytest.raises(BackendError, match="backend='cupy' cannot be used: cupy is not installed"):
        check_backend("auto", LIF)


def test_a_backend_of_ones_own_is_asked(monkeypatch):
    """All that a backend has to say, and that `auto` takes the first that wants the tensor."""
    neuron = FusedNeuron("test neurons")

    class Own(Backend):
        name = "own"
        kernels = {neuron: "kernels"}  # noqa: RUF012

        def is_default_for(self, x):
            return x.dtype == torch.float16

    monkeypatch.setitem(selection._REGISTERED, "own", Own())
    on_device = SimpleNamespace(is_cpu=False, is_cuda=False, dtype=torch.float16, device="npu")
    assert select_backend("auto", on_device, neuron) == "own"
    assert select_backend("auto", on_device, LIF) == "torch"
    assert selection.select_kernels("own", neuron, torch.ones(2)) == "kernels"


def test_environment_variable_is_read():
    code = "from sltt_ext.kernels import selection; print(selection.default_backend())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"SLTT_BACKEND": "torch"},
    )
    assert done.stdout == "torch\n"


@pytest.mark.parametrize("backend", ["auto", "cupy", "nvrtc"])
def test_fake_tensors_run_nothing(backend, problem):
    problem(None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x_seq = torch.empty(3, 4, device="cuda:0")
        assert x_seq.is_cuda
        assert select_backend(backend, x_seq) == "torch"


@needs_no_cuda
@pytest.mark.parametrize("backend", ["cupy", "nvrtc"])
def test_by_name_on_a_machine_without_cuda(backend):
    for call in (
        lambda: multi_step_lif(torch.ones(2, 3), backend=backend),
        lambda: sltt_ext.convert(torch.nn.Linear(2, 2), backend=backend),
    ):
        with pytest.raises(BackendError, match="PyTorch finds no CUDA device"):
            call()
