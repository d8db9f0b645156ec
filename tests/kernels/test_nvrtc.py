"""PyTorch's NVRTC, which needs no GPU, compiles the kernels, to what it makes of them through CuPy.

A few of the variants to machine code on every change; among the slow tests a selection of them for every architecture, and
every variant as far as PTX, which all architectures share; every variant to machine code for all of them with
SLTT_ALL_CUBINS=1 (`make cubins`).
"""

import ctypes
import dataclasses
import functools
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import variants

from sltt_ext.errors import BackendError
from sltt_ext.kernels import nvrtc
from sltt_ext.kernels.nvrtc import NVRTC, find_nvrtc
from sltt_ext.kernels.source import COMPILE_OPTIONS, CUPYS_OPTIONS, translation_unit

CUDA = torch.version.cuda
needs_nvrtc = pytest.mark.skipif(CUDA is None, reason="needs PyTorch built for CUDA, which brings NVRTC")
ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]


@functools.cache
def compiler():
    return find_nvrtc(CUDA)


def compiled(kernels, target):
    return compiler().compile(translation_unit(kernels), (*COMPILE_OPTIONS, *CUPYS_OPTIONS), target)


def machine_code(kernels, architecture):
    if architecture not in compiler().architectures:
        pytest.skip(f"NVRTC {compiler().version} makes nothing for sm_{architecture}")
    code = compiled(kernels, compiler().target(architecture))
    assert code.startswith(b"\x7fELF")
    return code


def assert_names(code, kernels):
    assert [kernel.name for kernel in kernels if kernel.name.encode() not in code] == []


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES if os.environ.get("SLTT_ALL_CUBINS") else [None])
@pytest.mark.parametrize("group", variants.groups())
def test_every_variant_compiles(group, architecture):
    kernels = variants.groups()[group]
    if architecture is None:
        assert_names(compiled(kernels, "compute_90"), kernels)
    else:
        assert_names(machine_code(kernels, architecture), kernels)


def few():
    """One of each function of each file, in every dtype."""
    seen = {}
    for kernel in reversed(variants.selection()):
        choices = dict(kernel.choices)
        seen[kernel.file, choices["FORWARD"], choices["THROUGH_TIME"]] = kernel
        seen[choices["SCALAR"]] = kernel
    return list(dict.fromkeys(seen.values()))


@needs_nvrtc
@pytest.mark.parametrize("k", range(len(few())))
def test_a_few_of_the_variants_compile(k):
    kernel = few()[k]
    assert_names(machine_code([kernel], 90), [kernel])


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_selection_of_the_variants_compiles(architecture):
    kernels = variants.selection()
    assert_names(machine_code(kernels, architecture), kernels)


@needs_nvrtc
@pytest.mark.parametrize("kernels", [few, pytest.param(variants.selection, marks=pytest.mark.slow)])
def test_the_machine_code_is_what_cupy_makes(kernels, monkeypatch):
    """All of CuPy's way from source to machine code, with its own options; only the device is made up."""
    cupy = pytest.importorskip("cupy")
    compiler_of_cupy, made = cupy.cuda.compiler, []
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    monkeypatch.setattr(compiler_of_cupy, "_get_arch", lambda: "90")
    module = SimpleNamespace(load=made.append, _set_mapping=lambda names: None)
    monkeypatch.setattr(compiler_of_cupy, "function", SimpleNamespace(Module=lambda: module))
    target = "-arch=sm_90", "cubin"
    monkeypatch.setattr(compiler_of_cupy, "_get_arch_for_options_for_nvrtc", lambda arch: target)
    compiler_of_cupy._compile_module_with_cache(translation_unit(kernels()), COMPILE_OPTIONS)
    if tuple(compiler_of_cupy._get_nvrtc_version()) != compiler().version:
        pytest.skip("CuPy finds another NVRTC")
    code = machine_code(kernels(), 90)
    assert made in ([code], [code[:-1]])  # CuPy leaves out the last byte, which pads


@needs_nvrtc
def test_a_mistake_does_not_compile():
    kernel = variants.selection()[0]
    mistaken = dataclasses.replace(kernel, choices=(*kernel.choices, ("WIDTH", "WIDE")))
    with pytest.raises(BackendError, match=r"NVRTC_ERROR_COMPILATION: .*WIDE"):
        compiled([mistaken], "sm_90")
    with pytest.raises(BackendError, match=r"NVRTC_ERROR_INVALID_OPTION: .*gpu-architecture"):
        compiled([kernel], "sm_999")


def library(architectures=(75, 90, 120), **functions):
    """A library that says what it supports, with ``functions`` in place of its own."""

    def supported(array):
        for k, architecture in enumerate(architectures):
            array[k] = architecture
        return 0

    def version(major, minor):
        major._obj.value, minor._obj.value = 13, 2
        return 0

    def count(number):
        number._obj.value = len(architectures)
        return 0

    stated = {
        "nvrtcVersion": version,
        "nvrtcGetNumSupportedArchs": count,
        "nvrtcGetSupportedArchs": supported,
        "nvrtcGetErrorString": lambda status: b"NVRTC_ERROR_%d" % status,
        **functions,
    }
    names = {*nvrtc._SIGNATURES, *stated}
    functions = {name: functools.partial(stated.get(name, lambda *arguments: 0)) for name in names}
    return SimpleNamespace(**functions)


@pytest.mark.parametrize(
    ("architecture", "target"),
    [(75, "sm_75"), (90, "sm_90"), (86, "compute_75"), (103, "compute_90"), (130, "compute_120")],
)
def test_what_is_compiled_for_a_device(architecture, target):
    assert NVRTC(library(), "here").target(architecture) == target


def test_a_device_that_is_too_old():
    with pytest.raises(BackendError, match=r"NVRTC 13.2 compiles for sm_75 and newer, the device is sm_70"):
        NVRTC(library(), "here").target(70)


def test_a_function_that_fails_and_one_that_is_missing():
    with pytest.raises(BackendError, match=r"nvrtcVersion failed in NVRTC \(here\): NVRTC_ERROR_7"):
        NVRTC(library(nvrtcVersion=lambda *arguments: 7), "here")
    lacking = library()
    del lacking.nvrtcGetCUBIN
    with pytest.raises(BackendError, match=r"here is not an NVRTC of CUDA 11.2 or newer: .*nvrtcGetCUBIN"):
        NVRTC(lacking, "here")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A machine whose libraries are the files of ``tmp_path``; what is loaded, in the order it is tried."""
    tried = []

    def load(name):
        tried.append(name)
        raise OSError(f"{name} is empty")

    monkeypatch.setattr(nvrtc.ctypes, "CDLL", load)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "conda"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "toolkit"))
    monkeypatch.delenv("CUDA_HOME", raising=False)

    def search(cuda, *files):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        tried.clear()
        with pytest.raises(BackendError) as error:
            find_nvrtc(cuda)
        return [name.removeprefix(str(tmp_path) + "/") for name in tried], str(error.value)

    return search


@pytest.mark.skipif(sys.platform == "win32", reason="names of Linux")
def test_where_it_is_looked_for(folders):
    others = [
        "nvidia/cu13/lib/libnvrtc-builtins.so.13.2",
        "nvidia/cu13/lib/libnvrtc.alt.so.13",
        "nvidia/cu13/lib/libcublas.so.13",
        "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        "toolkit/lib64/libnvrtc.so",
    ]
    inside = "torch/lib/libnvrtc-672ee683.so.13.0.48"
    toolkit, conda = "toolkit/lib64/libnvrtc.so.13.2.78", "conda/lib/libnvrtc.so.13"
    tried, _ = folders("13.2", "nvidia/cu13/lib/libnvrtc.so.13", inside, toolkit, conda, *others)
    assert tried == ["nvidia/cu13/lib/libnvrtc.so.13", inside, "libnvrtc.so.13", toolkit, conda]
    assert folders("12.8")[0] == ["nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "libnvrtc.so.12"]


def test_the_names_on_windows(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    names = nvrtc._names("12")
    assert names.fullmatch("nvrtc64_120_0.dll")
    assert not names.fullmatch("nvrtc64_120_0.alt.dll")
    assert not names.fullmatch("nvrtc64_130_0.dll")
    assert not names.fullmatch("nvrtc-builtins64_128.dll")


def test_none_is_found(folders):
    _, said = folders("13.2", "nvidia/cu13/lib/libnvrtc.so.13")
    assert "NVRTC of CUDA 13 cannot be loaded (" in said
    assert "libnvrtc.so.13 is empty" in said
    assert said.endswith("pip install 'nvidia-cuda-nvrtc==13.2.*', or set CUDA_PATH to a CUDA 13 toolkit")
    assert "pip install 'nvidia-cuda-nvrtc-cu12==12.8.*'" in folders("12.8")[1]


@needs_nvrtc
def test_the_one_that_pytorch_brings_is_found():
    assert ".".join(map(str, compiler().version)) == CUDA
    assert isinstance(compiler()._library, ctypes.CDLL)
