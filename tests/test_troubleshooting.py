"""Every error sltt_ext raises has a row in docs/troubleshooting.md or docs/data.md, and every row an error."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sltt_ext import errors

ROOT = Path(__file__).parent.parent
FOREIGN = (
    "No module named",
    "CuPy failed to load",
    "Failed to find CUDA",
    "CUDA_ERROR_NO_BINARY",
    "no kernel image",
    "NVRTC",
    "invalid value",
    "failed to open",
)
"""How messages begin that are not of this package: CUDA's tools', which the backend's errors pass on, and Python's."""
TYPED = {name for name, kind in vars(errors).items() if isinstance(kind, type)} | {"ArgumentTypeError"}
LISTED = {"UnsupportedModuleError"}  # convert lists these below one message of its own
SHORTEST = 7
"""Letters that a row has to share with a message."""


def template(node):
    """The text of an expression as a list of literal pieces; what is computed lies between them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = [template(value) for value in node.values]
    elif isinstance(node, ast.BinOp):
        parts = [template(node.left), template(node.right)]
    else:
        return ["", ""]
    joined = [""]
    for first, *others in parts:
        joined = [*joined[:-1], joined[-1] + first, *others]
    return joined


def texts():
    """The pieces of every text in the source."""
    return [
        template(node)
        for path in (ROOT / "sltt_ext").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp))
    ]


def raised():
    """Where -> the pieces of each message that is written where it is raised."""
    found = {}
    for path in sorted((ROOT / "sltt_ext").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                name = ast.unparse(node.exc.func).rpartition(".")[2]
                pieces = template(node.exc.args[0])
                if name in TYPED - LISTED and any(len(piece) >= SHORTEST for piece in pieces):
                    found[f"{path.relative_to(ROOT)}:{node.lineno}"] = pieces
    return found


def rows():
    """The messages in the tables' first columns; ``...`` stands for whatever is computed."""
    keys = []
    for page in ("troubleshooting.md", "data.md"):
        for line in (ROOT / "docs" / page).read_text().splitlines():
            if line.startswith("| ") and line.count(" | ") == 2:
                keys += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return keys


def tells(key, pieces):
    """Whether the words of ``key`` are those of the message, in their order, with ``...`` for what is computed."""
    words = [word.strip() for word in key.split("...") if word.strip()]
    pattern = r"[^\n]*".join(map(re.escape, words))
    return sum(map(len, words)) >= SHORTEST and re.search(pattern, "\0".join(pieces)) is not None


def test_every_error_has_a_row():
    keys = rows()
    assert {
        where: pieces for where, pieces in raised().items() if not any(tells(key, pieces) for key in keys)
    } == {}


def test_every_row_is_of_a_message():
    messages = texts()
    own = [key for key in rows() if not key.startswith(FOREIGN)]
    assert [key for key in own if not any(tells(key, pieces) for pieces in messages)] == []


def test_a_package_that_newer_ones_are_without():
    """What its import says is in the page, with the way in."""
    code = "import spikingjelly.clock_driven"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if not run.returncode:
        pytest.skip("it is there")
    assert run.stderr.strip().rpartition("ModuleNotFoundError: ")[2] in rows()
