"""The CUDA driver by ctypes, on a driver for the host: arguments, contexts, threads, errors."""

import threading
from types import SimpleNamespace

import fake_driver
import host
import pytest
import torch
from fake_driver import CONTEXTS, calls, library

from sltt_ext.errors import BackendError
from sltt_ext.kernels import cuda_lif, driver
from sltt_ext.kernels.driver import Driver, find_driver

KERNEL = cuda_lif.forward_kernel(torch.float32, 1, "sigmoid", 0, True, cuda_lif.NOTHING, False)
FIRST, SECOND = CONTEXTS


@pytest.fixture(autouse=True)
def _fresh():
    fake_driver.reset()
    yield
    fake_driver.reset()


@pytest.fixture
def load():
    """Load the kernel, which integrates and fires, on a device of one driver."""
    made = Driver(library())
    image = host.library_of(KERNEL)._name.encode()
    return lambda index=0: made.load(image, KERNEL.name, index)


def given(x_seq, spikes, v):
    """Arguments of the kernel: from 0.5, with a threshold of 1."""
    numbers = v.numel(), x_seq.shape[0], 0, 0.5, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0
    return x_seq.data_ptr(), 0, 0, spikes.data_ptr(), v.data_ptr(), 0, 0, 0, *numbers


def launched(run, x_seq, stream=0):
    spikes, v = torch.empty_like(x_seq), torch.empty_like(x_seq[0])
    run(1, given(x_seq, spikes, v), stream)
    return spikes, v


def test_a_kernel_gets_its_arguments(load):
    spikes, v = launched(load(), torch.tensor([[0.25, 0.75, -1.0], [0.5, 0.25, 1.0]]))
    assert spikes.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert v.tolist() == [0.25, 0.5, 0.5]


def test_the_order_of_calls(load):
    library().set_current(FIRST)
    run = load()
    assert calls() == [
        "cuDriverGetVersion()",
        "cuInit(0)",
        "cuDeviceGet(0)",
        "cuDevicePrimaryCtxRetain(40)",
        f"cuCtxPushCurrent_v2({FIRST})",
        f"cuModuleLoadData({FIRST})",
        f"cuModuleGetFunction({KERNEL.name})",
        "cuCtxPopCurrent_v2()",
    ]
    launched(run, torch.ones(2, 3), stream=77)
    launched(run, torch.ones(2, 3), stream=78)
    in_its_context = ["cuCtxGetCurrent()", "cuLaunchKernel(1, 256, 0, 77)"]
    assert calls() == [*in_its_context, "cuCtxGetCurrent()", "cuLaunchKernel(1, 256, 0, 78)"]


def test_a_context_is_retained_once_for_each_device(load):
    load(0), load(1), load(0)
    assert [call for call in calls() if call.startswith("cuDevicePrimary")] == [
        "cuDevicePrimaryCtxRetain(40)",
        "cuDevicePrimaryCtxRetain(41)",
    ]


@pytest.mark.parametrize("before", [0, SECOND])
def test_another_context_is_current_again_after_the_launch(load, before):
    run = load()
    library().set_current(before)
    calls()
    launched(run, torch.ones(2, 3))
    assert calls() == [
        "cuCtxGetCurrent()",
        f"cuCtxPushCurrent_v2({FIRST})",
        "cuLaunchKernel(1, 256, 0, 0)",
        "cuCtxPopCurrent_v2()",
    ]
    assert library().current() == before


def test_threads_that_launch_at_once_keep_their_arguments_apart(load):
    """Threads of their own have no context, as autograd's at first."""
    runs = [load(0), load(1)]
    library().pause_for(500)  # while one thread is in the driver, another packs its arguments
    wrong = []

    def work(number):
        for repetition in range(10):
            start = number + repetition / 64
            _, v = launched(runs[number % 2], torch.full((1, 5), start - 20))
            if v.tolist() != [start - 19.5] * 5:
                wrong.append((number, repetition))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("function", ["cuInit", "cuDriverGetVersion"])
def test_a_driver_that_cannot_start(function):
    library().fail(function.encode(), 700)
    with pytest.raises(
        BackendError, match=f"{function} failed .* CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory"
    ):
        Driver(library())


@pytest.mark.parametrize(
    "function", ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuModuleLoadData"]
)
def test_a_kernel_that_cannot_be_loaded(load, function):
    library().fail(function.encode(), 700)
    with pytest.raises(BackendError, match=f"{function} failed in the CUDA driver: CUDA_ERROR_ILLEGAL"):
        load()


def test_an_image_that_is_none_and_a_kernel_that_is_not_there():
    made = Driver(library())
    with pytest.raises(BackendError, match="cuModuleLoadData failed in the CUDA driver: error 200"):
        made.load(b"nothing.so", KERNEL.name, 0)
    with pytest.raises(BackendError, match="cuModuleGetFunction failed in the CUDA driver: error 500"):
        made.load(host.library_of(KERNEL)._name.encode(), "another", 0)
    assert library().current() == 0


@pytest.mark.parametrize("before", [0, FIRST])
def test_a_launch_that_fails(load, before):
    """What an earlier kernel has done is told here too; the thread's context is what it was."""
    run = load()
    library().set_current(before)
    library().fail(b"cuLaunchKernel", 700)
    with pytest.raises(BackendError, match=rf"the launch of {KERNEL.name} failed .* CUDA_ERROR_ILLEGAL"):
        launched(run, torch.ones(2, 3))
    assert library().current() == before
    library().fail(b"", 0)
    assert launched(run, torch.ones(2, 3))[0].tolist() == [[1.0] * 3] * 2


def test_a_library_that_lacks_a_function():
    with pytest.raises(BackendError, match=r"this is not a CUDA driver: .*cuInit"):
        Driver(SimpleNamespace())


def test_a_machine_without_a_driver(monkeypatch):
    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", load)
    with pytest.raises(BackendError, match=r"libcuda.so.1: cannot open.*install it, or .*--gpus all"):
        find_driver()


def test_the_version(load):
    assert Driver(library()).version == (13, 2)
