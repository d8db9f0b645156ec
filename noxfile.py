"""Checks in environments of their own; `nox -l` lists them."""

import nox

nox.options.sessions = ["wheel", "tests(oldest)", "clock_driven"]  # tests(newest) is what `make test` runs
nox.options.reuse_existing_virtualenvs = True


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel installs and imports in an environment with torch alone."""
    dist = session.create_tmp()
    session.install("build")
    session.run("python", "-m", "build", "--wheel", "--outdir", dist, silent=True)
    session.install("-c", "constraints.txt", "torch")
    session.install("--no-deps", "--force-reinstall", *[str(path) for path in _wheels(dist)])
    session.cd(dist)
    session.run("python", "-c", CONVERT_NOTHING)
    session.run("sltt", "--version")
    session.run("sltt", "demo", success_codes=[1])


TOOLS = [
    "hypothesis",
    "jsonargparse[signatures]",
    "lightning",
    "matplotlib",
    "nir",
    "nirtorch",
    "pandas",
    "pytest",
    "pytest-xdist",
    "rich",
    "scikit-learn",
    "tensorboard",
]
OLDEST_TORCH = ["torch==2.6.0", "torchvision==0.21.0", "numpy<2.3"]
LINES = {
    "oldest": [*OLDEST_TORCH, "spikingjelly==0.0.0.0.14", "snntorch==0.9.4", *TOOLS],
    "newest": ["-c", "constraints.txt", "torch", "torchvision", "spikingjelly", "snntorch", *TOOLS],
    "oldest-torch": [*OLDEST_TORCH, "spikingjelly==2.0.0", "snntorch==1.0.0", *TOOLS],
    "newest-torch": [
        "torch==2.15.0",
        "torchvision==0.29.2",
        "spikingjelly==0.0.0.0.14",
        "snntorch==0.9.4",
        *TOOLS,
    ],
}


WITHOUT_ACTIVATION_BASED = ["clock_driven", "declared", "legacy_spikingjelly", "published_style"]


@nox.session
@nox.parametrize("line", list(LINES), ids=list(LINES))
def tests(session: nox.Session, line: str) -> None:
    """The test suite with the oldest or newest supported frameworks, or with torch from the other end."""
    session.install(*LINES[line])
    session.install("--no-deps", "-e", ".")
    session.run("pytest", "-n", "2", "--dist", "loadgroup", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def clock_driven(session: nox.Session) -> None:
    """What is tested without `activation_based`, with the last SpikingJelly that has `clock_driven` alone."""
    session.install("-c", "constraints.txt", "torch", "numpy", "pytest", "pytest-xdist")
    session.install(
        "--no-deps", "spikingjelly==0.0.0.0.12"
    )  # of what it asks for, its neurons need these alone
    session.install("--no-deps", "-e", ".")
    session.run(
        "pytest", "-n", "2", *(f"tests/{folder}" for folder in WITHOUT_ACTIVATION_BASED), *session.posargs
    )


def _wheels(folder: str) -> list[str]:
    from pathlib import Path

    return sorted(map(str, Path(folder).glob("*.whl")))


CONVERT_NOTHING = """
import torch, sltt_ext
from sltt_ext.functional import multi_step_lif
try:
    sltt_ext.convert(torch.nn.Linear(2, 2))
except sltt_ext.ConversionError as error:
    print(error)
spikes, v = multi_step_lif(torch.ones(4, 3, requires_grad=True))
spikes.sum().backward()
print(sltt_ext.__version__, sltt_ext.__file__)
"""
