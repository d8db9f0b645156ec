"""NVRTC, which needs no GPU, compiles the kernels to machine code, with the options CuPy uses.

Every variant for one architecture, a selection for the others; all for all with SLTT_ALL_CUBINS=1 (`make cubins`).
"""

import os

import pytest
import variants

from sltt_ext.kernels.source import COMPILE_OPTIONS, translation_unit

nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy")

CUPYS_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
EVERYTHING_FOR = ARCHITECTURES if os.environ.get("SLTT_ALL_CUBINS") else [90]


def compile_to_cubin(kernels, architecture):
    if architecture not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} does not know sm_{architecture}")
    program = nvrtc.createProgram(translation_unit(kernels), "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*COMPILE_OPTIONS, f"-arch=sm_{architecture}", *CUPYS_OPTIONS))
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        pytest.fail(f"{error}\n{nvrtc.getProgramLog(program)[:3000]}")
    finally:
        nvrtc.destroyProgram(program)


def assert_has(cubin, kernels):
    assert cubin.startswith(b"\x7fELF")
    assert [kernel.name for kernel in kernels if kernel.name.encode() not in cubin] == []


@pytest.mark.parametrize("architecture", EVERYTHING_FOR)
@pytest.mark.parametrize("group", variants.groups())
def test_every_variant_compiles(group, architecture):
    kernels = variants.groups()[group]
    assert_has(compile_to_cubin(kernels, architecture), kernels)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - set(EVERYTHING_FOR)))
def test_a_selection_of_the_variants_compiles(architecture):
    kernels = variants.selection()
    assert_has(compile_to_cubin(kernels, architecture), kernels)


def test_a_mistake_does_not_compile():
    kernel = variants.selection()[0]
    with pytest.raises(pytest.fail.Exception, match="WIDE"):
        compile_to_cubin([type(kernel)(kernel.name, kernel.file, (*kernel.choices, ("WIDTH", "WIDE")))], 90)
