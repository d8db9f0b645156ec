"""Checkpoints from which a run resumes exactly: it ends with the same weights, bit for bit, as without the interruption.

A process may be killed at any moment, also while it writes, and a disk may give back wrong bits. So a checkpoint is first
written to another file, and gets its name when it is complete. The checkpoint before it is kept. Each ends with the SHA-256
of its content, which is compared before anything is loaded. ``torch.load`` can read the file, too, because it ignores what
follows the archive.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sltt_ext.errors import CheckpointError, warn
from sltt_ext.files import replaced, writing

__all__ = ["Checkpoints", "read_checkpoint"]

FORMAT = "sltt_ext checkpoint 2"
WITHOUT_CHECKSUM = "sltt_ext checkpoint 1"
MARK = b"sltt_ext sha256:"
"""Goes before the digest at the end of the file."""
CHECKSUM_BYTES = len(MARK) + hashlib.sha256().digest_size
BLOCK_BYTES = 1 << 20


class Checkpoints:
    """The last two checkpoints of a run, with everything that its next step depends on.

    Torch's random number generators are part of every checkpoint. With the same data order (see the example), a resumed run
    on the CPU, or with deterministic operators, continues as if it had never been interrupted:

        online = sltt_ext.OnlineTrainer(net, loss_fn, time_steps=6, k=2)
        checkpoints = Checkpoints("run", net=net, optimizer=optimizer, scheduler=scheduler, online=online)
        for step in range(checkpoints.resume(), steps):
            x, target = batch(step)  # a function of the number of the step
            ...
            if step % 100 == 99:
                checkpoints.save(step + 1)

    Args:
        folder: Where ``last.pt`` and ``previous.pt`` are; made if missing. Each process of a distributed run needs its own
            folder.
        parts: What to save, by name: anything with ``state_dict()`` and ``load_state_dict()`` (network, optimizer, scheduler,
            gradient scaler, `OnlineTrainer`), or a ``torch.Generator``.

    Raises:
        WriteError: If the folder cannot be made.

    Examples:
        >>> import tempfile
        >>> net = torch.nn.Linear(2, 1)
        >>> checkpoints = Checkpoints(tempfile.mkdtemp(), net=net)
        >>> checkpoints.resume()
        0
        >>> checkpoints.save(10)
        >>> checkpoints.resume()
        10
    """

    def __init__(self, folder: str | Path, **parts: Any) -> None:
        self.last = Path(folder) / "last.pt"
        self.previous = Path(folder) / "previous.pt"
        self.parts = parts
        with writing(self.last.parent):
            self.last.parent.mkdir(parents=True, exist_ok=True)

    def save(self, step: int) -> None:
        """Save every part, and the number of the step from which to continue.

        Raises:
            WriteError: If the file cannot be written. The existing checkpoints stay as they are.
        """
        content = {
            "format": FORMAT,
            "step": step,
            "parts": {name: _state(part) for name, part in self.parts.items()},
            "random": _random_state(),
        }
        with replaced(self.last, before=self.previous) as file:
            summed: Any = _Summed(file)
            torch.save(content, summed)
            file.write(MARK + summed.checksum.digest())

    def resume(self) -> int:
        """Load the last checkpoint that is complete.

        Returns:
            The step from which to continue; 0 if there is no checkpoint yet.

        Raises:
            CheckpointError: If there are checkpoints but none can be read, or if one does not fit the parts. The parts and
                torch's random numbers are then as before.

        Warns:
            SLTTWarning: If the last one cannot be read, and the one before it is used.
        """
        problems = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                content = _read(path)
            except CheckpointError as error:
                problems.append(error)
                continue
            if problems:
                warn(f"{problems[0]}; continuing from {path}, step {content['step']}")
            self._load(path, content)
            return int(content["step"])
        if problems:
            raise CheckpointError("; ".join(map(str, problems))) from problems[0]
        return 0

    def _load(self, path: Path, content: dict[str, Any]) -> None:
        saved, here = set(content["parts"]), set(self.parts)
        if saved != here:
            raise CheckpointError(
                f"{path} has the parts {', '.join(sorted(map(str, saved)))}, and this run has {', '.join(sorted(here))}: "
                "give Checkpoints the same ones"
            )
        name = ""
        with _all_or_nothing(self.parts):
            try:
                for name, part in self.parts.items():
                    _set_state(part, content["parts"][name])
                name = "torch's random numbers"
                _set_random_state(content["random"])
            except Exception as error:  # every kind of part has its own error
                raise CheckpointError(
                    f"{path} does not fit {name} ({type(error).__name__}: {error}): make the run as it was when it was "
                    "saved, or use another folder"
                ) from error


class _Summed:
    """Passes on what is written to a file, and updates a checksum of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.checksum = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.checksum.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def _all_or_nothing(parts: Mapping[str, Any]) -> Iterator[None]:
    """If an error ends the block, put all parts and torch's random numbers back."""
    random = _random_state()
    # a part may change its attributes in place or replace them: undo both
    before = [
        (part, dict(getattr(part, "__dict__", {})), copy.deepcopy(_state(part))) for part in parts.values()
    ]
    try:
        yield
    except BaseException:
        _set_random_state(random)
        for part, attributes, state in before:
            if attributes:
                vars(part).update(attributes)
                for name in vars(part).keys() - attributes.keys():
                    delattr(part, name)
            _set_state(part, state)
        raise


def _state(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _set_state(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)


def _random_state() -> dict[str, Tensor | list[Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    cuda, devices = state["cuda"], torch.cuda.device_count()
    if devices == 0:
        return  # without CUDA devices nothing draws from their generators
    if len(cuda) > devices:
        raise ValueError(f"they are of {len(cuda)} CUDA devices, and this machine has {devices}")
    torch.cuda.set_rng_state_all(cuda)


def read_checkpoint(path: Path) -> Any:
    """The content of a file written by ``torch.save``, on the CPU. Only tensors and plain Python values are read.

    Raises:
        CheckpointError: If there is no such file, if it cannot be read, or if its checksum does not match.
    """
    return _read_checked(path)[0]


def _read_checked(path: Path) -> tuple[Any, bool]:
    """The content of the file, and whether a checksum confirmed it."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        checked = _has_checksum(path)
        return torch.load(path, map_location="cpu", weights_only=True), checked
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: change its permissions") from error
    except Exception as error:  # a damaged file makes torch.load raise anything
        raise CheckpointError(
            f"{path} is truncated, or is not a checkpoint ({type(error).__name__})"
        ) from error


def _has_checksum(path: Path) -> bool:
    """Whether the file ends with a checksum; raises an error if it does not match the content."""
    with path.open("rb") as file:
        left = file.seek(0, os.SEEK_END) - CHECKSUM_BYTES
        if left < 0:
            return False
        file.seek(left)
        end = file.read()
        if not end.startswith(MARK):
            return False
        file.seek(0)
        checksum = hashlib.sha256()
        while left:
            block = file.read(min(left, BLOCK_BYTES))
            checksum.update(block)
            left -= len(block)
    if MARK + checksum.digest() != end:
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
    return True


def _read(path: Path) -> dict[str, Any]:
    content, checked = _read_checked(path)
    if not isinstance(content, dict) or content.get("format") not in (FORMAT, WITHOUT_CHECKSUM):
        raise CheckpointError(f"{path} was not written by sltt_ext.checkpoint")
    if content["format"] == FORMAT and not checked:
        raise CheckpointError(f"{path} is damaged: its checksum is missing")
    step, parts, random = (content.get(key) for key in ("step", "parts", "random"))
    if not (isinstance(step, int) and step >= 0 and isinstance(parts, dict) and isinstance(random, dict)):
        raise CheckpointError(
            f"{path} was not written by sltt_ext.checkpoint: it lacks step, parts or random"
        )
    return content
