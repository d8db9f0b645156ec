"""CUDA source of one specialised kernel, or of many in one translation unit."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from sltt_ext.kernels.geometry import THREADS
from sltt_ext.surrogate import SURROGATES

__all__ = ["COMPILE_OPTIONS", "CUPYS_OPTIONS", "SCALARS", "Kernel", "make_kernel", "translation_unit"]

COMPILE_OPTIONS = ("--std=c++17", "--fmad=false")
"""What NVRTC is given; without contraction, so that float32 results equal the torch backend's."""

CUPYS_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
"""What CuPy gives besides. Whoever compiles without CuPy gives it too, so that the machine code is the same."""

SCALARS = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""What the kernels compute with, and its name in CUDA."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel, specialised at compile time; made by `make_kernel`, one instance for each.

    Attributes:
        name: Name of the function, which tells all the choices.
        file: The CUDA file that holds it.
        choices: What is defined before that file is compiled.
    """

    name: str
    file: str
    choices: tuple[tuple[str, str | int], ...]


@functools.cache
def make_kernel(
    file: str, entry: str, dtype: torch.dtype, width: int, surrogate: str | None, **choices: int
) -> Kernel:
    """The kernel ``entry`` of ``file`` for elements of ``dtype``, ``width`` at once."""
    scalar = SCALARS[dtype]
    name = "_".join(map(str, ("sltt", file, entry, scalar, width, surrogate, *choices.values())))
    defined: dict[str, str | int] = {
        "KERNEL": name,
        "SCALAR": scalar,
        "WIDTH": width,
        "SURROGATE": "return 0;" if surrogate is None else SURROGATES[surrogate].cuda,
        "FORWARD": int(entry == "forward"),
        "THROUGH_TIME": int(entry == "backward_through_time"),
        **choices,
    }
    return Kernel(name, file, tuple(defined.items()))


def translation_unit(kernels: Iterable[Kernel]) -> str:
    """Source code that holds the given kernels."""
    parts = [f"#define THREADS {THREADS}", _text("vector")]
    for kernel in kernels:
        parts += [f"#define {name} {value}" for name, value in kernel.choices]
        parts += [f"namespace of_{kernel.name} {{", _text(kernel.file), "}"]
        parts += [f"#undef {name}" for name, _ in kernel.choices]
    return "\n".join(parts)


@functools.cache
def _text(file: str) -> str:
    return (Path(__file__).parent / f"{file}.cu").read_text()
