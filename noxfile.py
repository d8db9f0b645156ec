"""Checks in environments of their own; `nox -l` lists them."""

import re
import shutil
from pathlib import Path

import nox

DIST = Path("dist").resolve()

nox.options.sessions = [
    "clock_driven",
    "tests(oldest)",
]  # clock_driven has what wheel does; tests(newest) is what `make test` runs
nox.options.reuse_existing_virtualenvs = True


@nox.session
def distributions(session: nox.Session) -> None:
    """The wheel and the source distribution, in dist/, are as a package index wants them."""
    session.install("build", "check-wheel-contents", "twine")
    shutil.rmtree(DIST, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(DIST), silent=True)
    session.run("twine", "check", "--strict", *map(str, DIST.iterdir()))
    session.run("check-wheel-contents", str(DIST))


@nox.session(requires=["distributions"])
def wheel(session: nox.Session) -> None:
    """The wheel installs and imports in an environment with torch alone."""
    _install_wheel(session)


def _install_wheel(session: nox.Session) -> None:
    (built,) = DIST.glob("*.whl")
    session.install("-c", "constraints.txt", "torch")
    session.install("--no-deps", "--force-reinstall", str(built))
    with session.chdir(session.create_tmp()):
        session.run("python", "-c", CONVERT_NOTHING)
        session.run("sltt", "--version")
        session.run("sltt", "demo", success_codes=[1])


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """A tag, `nox -s release -- v1.2.3`, names the version, and the changelog has it with its date; then `wheel`."""
    (tag,) = session.posargs
    version = re.search(r'^__version__ = "(.+)"$', Path("sltt_ext/__init__.py").read_text(), re.MULTILINE)[1]
    if tag != f"v{version}":
        session.error(f"the tag is {tag}, and sltt_ext/__init__.py has {version}")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    if not re.search(heading, Path("CHANGELOG.md").read_text(), re.MULTILINE):
        session.error(f"CHANGELOG.md has no heading '## [{version}] - YYYY-MM-DD'")
    session.notify("distributions", posargs=[])
    session.notify("wheel", posargs=[])


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
    session.run(
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadgroup",
        *session.posargs,
        env={"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
    )


@nox.session(requires=["distributions"])
def clock_driven(session: nox.Session) -> None:
    """`wheel`, and what is tested without `activation_based`, with the last SpikingJelly that has `clock_driven` alone."""
    _install_wheel(session)
    session.install("-c", "constraints.txt", "numpy", "pytest", "pytest-xdist")
    session.install(
        "--no-deps", "spikingjelly==0.0.0.0.12"
    )  # of what it asks for, its neurons need these alone
    session.run(
        "pytest", "-n", "2", *(f"tests/{folder}" for folder in WITHOUT_ACTIVATION_BASED), *session.posargs
    )


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
