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
from sltt_ext.kernels import cuda_backend, launch, selection
from sltt_ext.kernels.backend import Backend, FusedNeuron
from sltt_ext.kernels.leaky import LEAKY
from sltt_ext.kernels.lif import LIF
from sltt_ext.kernels.selection import check_backend

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    caches = (launch._problem_of_machine, launch._problem_of_device, selection._warn_once)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(selection, "_ENVIRONMENT", "auto")
    yield
    for cache in caches:
        cache.cache_clear()


def on_cuda(dtype=torch.float32):
    """What the choice of backend looks at."""
    return SimpleNamespace(is_cuda=True, is_cpu=False, dtype=dtype, device=torch.device("cuda", 0))


def select_backend(backend, x, neuron=LIF):
    return selection.select_backend(backend, neuron, x).name


@pytest.fixture
def problem(monkeypatch):
    """Set what is wrong with the CuPy kernels."""

    def set_problem(text):
        monkeypatch.setattr(cuda_backend, "cupy_problem", lambda index=None: text)

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
    assert select_backend("cupy", on_cuda(dtype)) == "cupy"
    assert select_backend("torch", on_cuda(dtype)) == "torch"


def test_auto_on_cuda_in_float64_is_torch_without_a_word(problem):
    problem(None)
    assert select_backend("auto", on_cuda(torch.float64)) == "torch"


def test_auto_without_cupy_warns_once_per_cause(problem):
    problem("cupy is not installed: pip install 'sltt-ext[cupy13]'")
    with pytest.warns(UserWarning, match=r"pip install 'sltt-ext\[cupy13\]'.*SLTT_BACKEND=torch"):
        assert select_backend("auto", on_cuda()) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend("auto", on_cuda()) == "torch"
    problem("another cause")
    with pytest.warns(UserWarning, match="another cause"):
        select_backend("auto", on_cuda())


def test_cupy_by_name_is_never_replaced(problem):
    problem("cupy is not installed")
    with pytest.raises(BackendError, match="cannot be used: cupy is not installed"):
        select_backend("cupy", on_cuda())
    with pytest.raises(BackendError, match="cannot be used: cupy is not installed"):
        check_backend("cupy")
    problem(None)
    with pytest.raises(BackendError, match="x_seq is on cpu"):
        select_backend("cupy", torch.ones(2))
    with pytest.raises(InputError, match="float64"):
        select_backend("cupy", on_cuda(torch.float64))


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


@pytest.mark.parametrize("backend", ["auto", "cupy"])
def test_fake_tensors_run_nothing(backend, problem):
    problem(None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x_seq = torch.empty(3, 4, device="cuda:0")
        assert x_seq.is_cuda
        assert select_backend(backend, x_seq) == "torch"


@needs_no_cuda
def test_by_name_on_a_machine_without_cuda():
    for call in (
        lambda: multi_step_lif(torch.ones(2, 3), backend="cupy"),
        lambda: sltt_ext.convert(torch.nn.Linear(2, 2), backend="cupy"),
    ):
        with pytest.raises(BackendError, match="PyTorch finds no CUDA device"):
            call()


@pytest.fixture
def cuda(monkeypatch):
    """A machine with PyTorch for CUDA 13, as far as looking for problems goes."""
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setattr(launch, "cupy_versions", lambda: {"CuPy's CUDA": "13.2"})
    return monkeypatch


def raises(error):
    def call(*args):
        raise error

    return call


def test_nothing_is_wrong(cuda):
    assert launch.cupy_problem() is None


def test_cupy_is_missing(cuda):
    cuda.setitem(sys.modules, "cupy", None)
    assert launch.cupy_problem() == "cupy is not installed: pip install 'sltt-ext[cupy13]'"
    launch._problem_of_machine.cache_clear()
    cuda.setattr(torch.version, "cuda", "12.8")
    assert launch.cupy_problem() == "cupy is not installed: pip install 'sltt-ext[cupy12]'"


def test_cupy_for_another_cuda(cuda):
    cuda.setattr(launch, "cupy_versions", lambda: {"CuPy's CUDA": "12.9"})
    problem = launch.cupy_problem()
    assert "CuPy is built for CUDA 12.9, PyTorch for 13.2" in problem
    assert "pip install 'sltt-ext[cupy13]'" in problem


def test_nvrtc_is_missing(cuda):
    cuda.setattr(launch, "cupy_versions", raises(RuntimeError("CuPy failed to load libnvrtc.so.13: OSError")))
    problem = launch.cupy_problem()
    assert "libnvrtc.so.13" in problem
    assert "pip install 'cupy-cuda13x[ctk]'" in problem


def test_rocm(cuda):
    cuda.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in launch.cupy_problem()


@pytest.fixture
def device(cuda):
    """A device whose compiler can be made to fail."""
    cuda.setattr(torch.cuda, "device", lambda index: warnings.catch_warnings())
    cuda.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Test")
    cuda.setattr(launch, "_COMPILED", {})

    def compiler(get_function):
        module = SimpleNamespace(get_function=get_function)
        cuda.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=lambda **options: module))

    return compiler


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find CUDA headers."),
        RuntimeError("nvrtc: error: invalid value for --gpu-architecture (-arch)"),
        RuntimeError(
            "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device"
        ),
    ],
    ids=str,
)
def test_a_compiler_that_fails(device, error):
    device(raises(error))
    assert launch.cupy_problem() is None
    problem = launch.cupy_problem(0)
    assert str(error) in problem
    assert "pip install -U 'cupy-cuda13x[ctk]'" in problem


def test_a_kernel_is_compiled_once_per_device(device):
    compiled = []
    device(lambda name: SimpleNamespace(kernel=compiled.append(name) or name))
    assert [launch.cupy_problem(index) for index in (0, 1, 0)] == [None, None, None]
    assert len(compiled) == 2


def test_capture_before_the_first_run_is_refused_and_not_remembered(device, monkeypatch):
    device(lambda name: SimpleNamespace(kernel=name))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match="once before the capture"):
        launch.cupy_problem(0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert launch.cupy_problem(0) is None


def test_launches_on_the_current_stream_and_device(device, monkeypatch):
    calls = []
    device(lambda name: SimpleNamespace(kernel=lambda *args, stream: calls.append((*args, stream.ptr))))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=700 + index))
    kernel = launch.make_kernel(
        "lif", "forward", torch.float32, 4, None, CHARGE=0, SOFT_RESET=1, SAVE=0, SAVE_SLOPES=0
    )
    launch.launch_on_device(kernel, 12, (1, 2.0), torch.device("cuda", 3))
    assert calls == [((12,), (256,), (1, 2.0), 703)]
