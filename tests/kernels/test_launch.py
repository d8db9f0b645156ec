"""What launchers share, and the one of PyTorch's NVRTC and the driver, on machines that are made up."""

import threading
import time
from types import SimpleNamespace

import fake_driver
import pytest
import torch
from fake_driver import calls, library

from sltt_ext.errors import BackendError
from sltt_ext.functional import multi_step_leaky, multi_step_lif, multi_step_plif
from sltt_ext.kernels import cuda_lif, nvrtc_launcher
from sltt_ext.kernels.launch import Launcher
from sltt_ext.kernels.nvrtc_launcher import NvrtcLauncher

KERNEL = cuda_lif.forward_kernel(torch.float32, 1, "sigmoid", 0, True, cuda_lif.NOTHING, False)
DEVICES = [torch.device("cuda", index) for index in (0, 1)]


class Recorded(Launcher):
    """Loads nothing, and records what is asked of it."""

    name = "recorded"

    def __init__(self, error=None):
        super().__init__()
        self.error, self.compiled, self.launched = error, [], []

    def versions(self):
        return {}

    def _load(self, kernel, index):
        self.compiled.append((kernel.name, index))
        if self.error is not None:
            raise self.error
        return lambda *given: self.launched.append((index, *given))

    def _problem_of_software(self, cuda):
        return None if cuda == "13.2" else f"not for {cuda}"

    def _cure(self, device, cuda):
        return f"Newer than {device} and {cuda}"


@pytest.fixture
def cuda(monkeypatch):
    """A machine with PyTorch for CUDA 13 and two devices."""
    fake_driver.machine(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Test")
    return monkeypatch


def test_launches_on_the_current_stream_of_the_device(cuda):
    launcher = Recorded()
    launcher.launch(KERNEL, 12, (1, 2.0), DEVICES[1])
    assert launcher.launched == [(1, 12, (1, 2.0), 701)]


def test_a_kernel_is_compiled_once_for_each_device(cuda):
    launcher = Recorded()
    for device in (*DEVICES, *DEVICES):
        launcher.launch(KERNEL, 1, (), device)
    assert launcher.compiled == [(KERNEL.name, 0), (KERNEL.name, 1)]


def test_threads_that_ask_at_once_compile_once(cuda):
    class Slow(Recorded):
        def _load(self, kernel, index):
            time.sleep(0.05)  # long enough for the others to ask
            return super()._load(kernel, index)

    launcher = Slow()
    threads = [threading.Thread(target=launcher.launch, args=(KERNEL, 1, (), DEVICES[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(launcher.compiled) == 1
    assert len(launcher.launched) == 4


@pytest.mark.parametrize("error", [RuntimeError("no kernel image\nis available"), BackendError("no kernel")])
def test_a_compiler_that_fails(cuda, error):
    launcher = Recorded(error)
    assert launcher.problem() is None
    said = "no kernel" if type(error) is BackendError else "RuntimeError: no kernel image is available"
    problem = launcher.problem(0)
    assert problem.startswith("the kernel sltt_lif_forward_float_1_None_0_1_0_0 cannot be compiled: ")
    assert problem.endswith(f": {said}. Newer than NVIDIA Test and 13.2")
    with pytest.raises(BackendError, match="cannot be compiled"):
        launcher.launch(KERNEL, 1, (), DEVICES[0])


def test_a_device_is_tried_once(cuda):
    launcher = Recorded()
    assert [launcher.problem(index) for index in (0, 1, 0, None)] == [None] * 4
    assert [index for _, index in launcher.compiled] == [0, 1]


def test_capture_before_the_first_run_is_refused_and_not_remembered(cuda):
    launcher = Recorded()
    cuda.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for call in (lambda: launcher.problem(0), lambda: launcher.launch(KERNEL, 1, (), DEVICES[0])):
        with pytest.raises(BackendError, match="once before the capture"):
            call()
    cuda.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert launcher.problem(0) is None
    launcher.launch(KERNEL, 1, (), DEVICES[0])
    cuda.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launcher.launch(KERNEL, 1, (), DEVICES[0])
    assert len(launcher.launched) == 2


def test_machines_without_cuda(cuda):
    cuda.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch finds no CUDA device" in Recorded().problem(0)
    cuda.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in Recorded().problem(0)


def test_what_is_installed_is_asked_for_pytorchs_cuda(cuda):
    cuda.setattr(torch.version, "cuda", "12.8")
    assert Recorded().problem(0) == "not for 12.8"


def raises(error):
    def call(*given):
        raise error

    return call


@pytest.mark.parametrize("missing", ["find_nvrtc", "find_driver"])
def test_nvrtc_or_driver_are_missing(cuda, missing):
    cuda.setattr(nvrtc_launcher, "find_nvrtc", lambda version: "NVRTC")
    cuda.setattr(nvrtc_launcher, "find_driver", lambda: "driver")
    assert NvrtcLauncher().problem() is None
    cuda.setattr(nvrtc_launcher, missing, raises(BackendError("it cannot be loaded: pip install")))
    assert NvrtcLauncher().problem() == NvrtcLauncher().problem(0) == "it cannot be loaded: pip install"


def test_a_device_that_nvrtc_cannot_run(cuda):
    launcher = fake_driver.HostLauncher()
    library().fail(b"cuModuleLoadData", 700)
    problem = launcher.problem(0)
    assert "cuModuleLoadData failed in the CUDA driver: CUDA_ERROR_ILLEGAL_ADDRESS" in problem
    assert "NVRTC or the driver is older than NVIDIA Test: install a newer driver, or PyTorch" in problem


def test_the_versions_that_nvrtc_tells(cuda):
    launcher = fake_driver.HostLauncher()
    launcher._nvrtc = SimpleNamespace(version=(13, 2), path="lib/libnvrtc.so.13")
    nvrtc = {"PyTorch's NVRTC": "13.2, lib/libnvrtc.so.13"}
    assert launcher.versions() == {**nvrtc, "CUDA driver": "CUDA 13.2"}
    launcher._driver = None
    cuda.setattr(nvrtc_launcher, "find_driver", raises(BackendError("it cannot be loaded")))
    assert launcher.versions() == {**nvrtc, "CUDA driver": "none: it cannot be loaded"}
    cuda.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match="built without CUDA"):
        NvrtcLauncher().versions()


def results(neuron, x, backend):
    x_seq, parameter = x.clone().requires_grad_(), torch.tensor(0.0, requires_grad=True)
    options = {"backend": backend, "through_time": "through time" in neuron}
    if neuron.startswith("leaky"):
        s_seq, v = multi_step_leaky(x_seq, beta=parameter, **options)
    elif neuron.startswith("plif"):
        s_seq, v = multi_step_plif(x_seq, parameter, **options)
    else:
        s_seq, v = multi_step_lif(x_seq, **options)
    (s_seq.sum() + v.square().sum()).backward()
    learned = [] if parameter.grad is None else [parameter.grad]
    return [s_seq.detach(), v.detach(), x_seq.grad, *learned]


@pytest.mark.parametrize("neuron", ["lif", "plif", "plif through time", "leaky", "leaky through time"])
@pytest.mark.parametrize("in_a_thread", [False, True])
def test_what_reaches_the_kernels_is_what_cupy_hands_them(neuron, in_a_thread, monkeypatch):
    """Bit for bit what the same source computes that is called without a driver; in a thread of its own too."""
    import host

    fake_driver.register(monkeypatch)
    host.register(monkeypatch)
    x, got = torch.randn(3, 40), []
    want = results(neuron, x, "cupy")
    work = threading.Thread(target=lambda: got.extend(results(neuron, x, "nvrtc")))
    if in_a_thread:
        work.start(), work.join()
    else:
        work.run()
    assert [torch.equal(*pair) for pair in zip(got, want, strict=True)] == [True] * len(want)


def test_a_launch_after_the_first_does_nothing_else(monkeypatch):
    """Nothing that waits, allocates or loads: a CUDA graph may be captured."""
    fake_driver.register(monkeypatch)
    x = torch.randn(3, 40)
    multi_step_lif(x, backend="nvrtc")
    library().set_current(fake_driver.CONTEXTS[0])
    calls()
    multi_step_lif(x, backend="nvrtc")
    assert calls() == ["cuCtxGetCurrent()", "cuLaunchKernel(1, 256, 0, 700)"]


def test_compiles_for_the_device_with_the_options_of_cupy(cuda):
    asked = []

    class Compiler:
        def target(self, architecture):
            return f"sm_{architecture}"

        def compile(self, source, options, target):
            asked.append((options, target))
            return b"image"

    launcher = NvrtcLauncher()
    launcher._nvrtc = Compiler()
    launcher._driver = type("D", (), {"load": staticmethod(lambda *given: asked.append(given) or given)})
    cuda.setattr(torch.cuda, "get_device_capability", lambda index: (12, index))
    assert launcher._load(KERNEL, 1) == (b"image", KERNEL.name, 1)
    options = ("--std=c++17", "--fmad=false", "-ftz=true", "--device-as-default-execution-space")
    assert asked[0] == (options, "sm_121")
