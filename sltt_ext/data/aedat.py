"""Event files as cameras write them: AEDAT 2.0 (CIFAR10-DVS) and AEDAT 3.1 (DVS128 Gesture).

They take the files that SpikingJelly's readers take and give the same values, but read arrays instead of one event
at a time. Format: https://docs.inivation.com/software/software-advanced-usage/file-formats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Events", "read_aedat2", "read_aedat3"]

Events = dict[str, Any]
"""``t`` in microseconds, ``x``, ``y`` in pixels, ``p`` polarity 0 or 1: arrays ``[number of events]``."""

END_OF_HEADER = b"#!END-HEADER\r\n"
PACKET_HEADER_BYTES = 28
EVENT_BYTES = 8
POLARITY_EVENTS = 1


def read_aedat3(path: str | Path) -> Events:
    """The polarity events of an AEDAT 3.1 file.

    Raises:
        ValueError: If the file ends in the middle of a packet, or has no events.
    """
    content = Path(path).read_bytes()
    place = _after_comments(content)
    addresses, times = [], []
    while place < len(content):
        header = content[place : place + PACKET_HEADER_BYTES]
        if len(header) < PACKET_HEADER_BYTES:
            raise ValueError("it ends in the header of a packet")
        kind = int.from_bytes(header[:2], "little")
        size, _, overflow, capacity = np.frombuffer(header, "<u4", 4, offset=4).tolist()
        place += PACKET_HEADER_BYTES
        packet = content[place : place + size * capacity]
        place += size * capacity
        if place > len(content):
            raise ValueError(f"it ends in a packet, {place - len(content)} bytes before the packet does")
        if kind == POLARITY_EVENTS:
            if size != EVENT_BYTES:
                raise ValueError(f"it has events of {size} bytes, not {EVENT_BYTES}")
            events = np.frombuffer(packet, "<u4").reshape(-1, 2)
            addresses.append(events[:, 0])
            times.append(events[:, 1].astype(np.int64) | overflow << 31)
    if not addresses:
        raise ValueError("it has no events")
    address = np.concatenate(addresses)
    return {"t": np.concatenate(times), "x": address >> 17, "y": address >> 2 & 0x7FFF, "p": address >> 1 & 1}


def read_aedat2(path: str | Path) -> Events:
    """The events of an AEDAT 2.0 file of a 128 x 128 camera, turned as SpikingJelly does.

    The format does not say how many there are: a file that was cut between two events cannot be told from a whole one.

    Raises:
        ValueError: If the file ends in the middle of an event, or has none.
    """
    content = Path(path).read_bytes()
    place = _after_comments(content)
    if (len(content) - place) % EVENT_BYTES:
        raise ValueError("it ends in an event")
    if place == len(content):
        raise ValueError("it has no events")
    address, t = np.frombuffer(content, ">u4", offset=place).astype(np.int64).reshape(-1, 2).T
    return {
        "t": t,
        "x": 127 - (address >> 8 & 0x7F),
        "y": 127 - (address >> 1 & 0x7F),
        "p": 1 - (address & 1),
    }


def _after_comments(content: bytes) -> int:
    """Where the lines that begin with # end."""
    place = 0
    while content[place : place + 1] == b"#":
        line = place
        place = content.index(b"\n", place) + 1
        if content[line:place] == END_OF_HEADER:
            break
    return place
