"""NVRTC, which needs no GPU, compiles the kernels with the options CuPy uses.

A selection of the variants to machine code for every architecture, and every variant as far as PTX, which all
architectures share; every variant to machine code for all of them with SLTT_ALL_CUBINS=1 (`make cubins`).
"""

import os

import pytest
import variants

from sltt_ext.kernels.source import COMPILE_OPTIONS, translation_unit

nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy")

CUPYS_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
ONE_AT_ONCE = [
    pytest.param(architecture, marks=[] if architecture == 90 else pytest.mark.slow)
    for architecture in ARCHITECTURES
]


def compile_to_cubin(kernels, architecture):
    if architecture not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} does not know sm_{architecture}")
    return compiled(kernels, f"sm_{architecture}", nvrtc.getCUBIN)


def compiled(kernels, target, result):
    program = nvrtc.createProgram(translation_unit(kernels), "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*COMPILE_OPTIONS, f"-arch={target}", *CUPYS_OPTIONS))
        return result(program)
    except nvrtc.NVRTCError as error:
        pytest.fail(f"{error}\n{nvrtc.getProgramLog(program)[:3000]}")
    finally:
        nvrtc.destroyProgram(program)


def assert_has(cubin, kernels):
    assert cubin.startswith(b"\x7fELF")
    assert_names(cubin, kernels)


def assert_names(code, kernels):
    assert [kernel.name for kernel in kernels if kernel.name.encode() not in code] == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES if os.environ.get("SLTT_ALL_CUBINS") else [None])
@pytest.mark.parametrize("group", variants.groups())
def test_every_variant_compiles(group, architecture):
    kernels = variants.groups()[group]
    if architecture is None:
        assert_names(compiled(kernels, "compute_90", nvrtc.getPTX), kernels)
    else:
        assert_has(compile_to_cubin(kernels, architecture), kernels)


@pytest.mark.parametrize("architecture", ONE_AT_ONCE)
def test_a_selection_of_the_variants_compiles(architecture):
    kernels = variants.selection()
    assert_has(compile_to_cubin(kernels, architecture), kernels)


def test_a_mistake_does_not_compile():
    kernel = variants.selection()[0]
    with pytest.raises(pytest.fail.Exception, match="WIDE"):
        compile_to_cubin([type(kernel)(kernel.name, kernel.file, (*kernel.choices, ("WIDTH", "WIDE")))], 90)
