"""What `sltt env` reports: versions, devices, and which backend runs the fused neurons on each."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import sltt_ext
from sltt_ext.errors import BackendError
from sltt_ext.kernels import default_backend
from sltt_ext.kernels.cuda_backend import CupyBackend, NvrtcBackend
from sltt_ext.kernels.launch import Launcher

__all__ = ["environment"]


def environment() -> dict[str, str]:
    """Versions, devices and backends by name, in the order to print them in."""
    report = {
        "sltt-ext": sltt_ext.__version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "PyTorch": torch.__version__,
        "PyTorch's CUDA": torch.version.cuda or "none",
        **_versions("CuPy", CupyBackend.launcher),
        **_versions("PyTorch's NVRTC", NvrtcBackend.launcher),
        "SpikingJelly": _version("spikingjelly"),
        "snnTorch": _version("snntorch"),
        "CPU": f"{torch.get_num_threads()} threads: backend torch",
    }
    if not torch.cuda.is_available():
        report["CUDA devices"] = "none (torch.cuda.is_available() is False)"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
        report[f"cuda:{index}"] = f"{name}: {_backend_on(index)}"
    try:
        default = default_backend()
    except BackendError as error:
        return {**report, "default backend": f"none: {error}"}
    chosen_by = "" if default == "auto" else ", from the environment variable SLTT_BACKEND"
    return {**report, "default backend": f"{default}{chosen_by}"}


def _versions(name: str, launcher: Launcher) -> dict[str, str]:
    try:
        return launcher.versions()
    except ModuleNotFoundError as error:
        return {name: f"not installed ({error.name})"}
    except Exception as error:  # whatever is wrong with it is what this report is for
        return {name: f"cannot be used: {type(error).__name__}: {error}"}


def _backend_on(index: int) -> str:
    problems: list[str] = []
    for launcher in (CupyBackend.launcher, NvrtcBackend.launcher):
        if (problem := launcher.problem(index)) is None:
            return "; ".join([f"backend {launcher.name}", *problems])
        problems.append(f"not {launcher.name}, because {problem}")
    return "; ".join(["backend torch", *problems])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
