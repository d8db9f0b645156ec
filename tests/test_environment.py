import json
from types import SimpleNamespace

import pytest
import torch

from sltt_ext import cli, environment
from sltt_ext.kernels import selection
from sltt_ext.kernels.cuda_backend import CupyBackend, NvrtcBackend


def test_text_and_json_tell_the_same(capsys):
    assert cli.main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ", 1)[0] for line in lines] == list(report)
    assert all(line.endswith(value) for line, value in zip(lines, report.values()))


def test_names_what_a_bug_report_needs():
    report = environment.environment()
    for name in (
        "sltt-ext",
        "Python",
        "PyTorch",
        "PyTorch's CUDA",
        "CuPy",
        "PyTorch's NVRTC",
        "SpikingJelly",
        "snnTorch",
        "default backend",
    ):
        assert report[name]
    assert report["PyTorch"] == torch.__version__


@pytest.fixture
def two_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA Test {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))


def test_says_for_each_device_which_backend_and_why(two_devices, monkeypatch):
    found = {"cupy": [None, "CuPy is not installed"], "nvrtc": [None, None]}
    for backend in (CupyBackend, NvrtcBackend):
        problems = found[backend.name]
        monkeypatch.setattr(backend.launcher, "problem", problems.__getitem__)
    report = environment.environment()
    assert report["cuda:0"] == "NVIDIA Test 0, sm_90: backend cupy"
    without_cupy = "NVIDIA Test 1, sm_90: backend nvrtc; not cupy, because CuPy is not installed"
    assert report["cuda:1"] == without_cupy
    found["nvrtc"][1] = "NVRTC cannot be loaded"
    assert environment.environment()["cuda:1"] == (
        without_cupy.replace("backend nvrtc", "backend torch") + "; not nvrtc, because NVRTC cannot be loaded"
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModuleNotFoundError("no", name="cupy"), "not installed (cupy)"),
        (
            RuntimeError("CuPy failed to load libnvrtc.so.13"),
            "RuntimeError: CuPy failed to load libnvrtc.so.13",
        ),
    ],
)
def test_a_broken_cupy_does_not_break_the_report(error, expected, monkeypatch):
    def broken():
        raise error

    monkeypatch.setattr(CupyBackend.launcher, "versions", broken)
    assert expected in environment.environment()["CuPy"]


def test_nvrtc_is_named_by_version_and_place(monkeypatch):
    monkeypatch.setattr(
        NvrtcBackend.launcher, "_nvrtc", SimpleNamespace(version=(13, 2), path="libnvrtc.so.13")
    )
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert environment.environment()["PyTorch's NVRTC"] == "13.2, libnvrtc.so.13"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in environment.environment()["PyTorch's NVRTC"]


def test_the_environment_variable_is_named(monkeypatch):
    monkeypatch.setattr(selection, "_ENVIRONMENT", "torch")
    assert environment.environment()["default backend"] == "torch, from the environment variable SLTT_BACKEND"
    monkeypatch.setattr(selection, "_ENVIRONMENT", "cuda")
    assert "SLTT_BACKEND is 'cuda'" in environment.environment()["default backend"]
