"""What the benchmark has to show, as figures that are read from its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Rows = list[dict[str, str]]
Best = tuple[float, str]
Figure = Callable[[Rows], Best | None]


@dataclass(frozen=True)
class Claim:
    """One target.

    Attributes:
        text: What is compared with what.
        limit: The target.
        file: The results' file.
        figure: Our best figure in its rows, and with which settings; None if there is none yet.
        at_least: The figure has to be at least the limit, not at most.
    """

    text: str
    limit: float
    file: str
    figure: Figure
    at_least: bool = False

    @property
    def target(self) -> str:
        """The target in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}"

    def holds(self, value: float) -> bool:
        """Whether a figure is within the target."""
        return value >= self.limit if self.at_least else value <= self.limit


def lowest(what: str, column: str, **where: str) -> Figure:
    """The lowest value of a column in our rows that compute ``what``, with any speed-ups."""

    def figure(rows: Rows) -> Best | None:
        ours = [row for row in rows if is_ours(row, what) and where.items() <= row.items()]
        return min(((float(row[column]), row["contender"]) for row in ours), default=None)

    return figure


def is_ours(row: dict[str, str], what: str) -> bool:
    return row["contender"].startswith(f"{what}, sltt_ext")


def growth(rows: Rows) -> Best | None:
    """Peak memory at T = 32 over that at T = 4, minus one, of the settings that are leanest at T = 32."""
    peaks = {
        (int(row["time_steps"]), row["contender"]): float(row["peak_mb"])
        for row in rows
        if is_ours(row, "SLTT")
    }
    longest = [(peak, name) for (time_steps, name), peak in peaks.items() if time_steps == 32]
    if not longest:
        return None
    peak, name = min(longest)
    return peak / peaks[4, name] - 1, name


def neuron(compiled: bool) -> Figure:
    """How many times as fast our neuron is in float32, called as it is best: where surrogate and reset make it least."""

    def figure(rows: Rows) -> Best | None:
        best: dict[tuple[str, str], Best] = {}
        for row in rows:
            ours = row["contender"].startswith("sltt_ext")
            if ours and row["dtype"] == "float32" and compiled == ("compiled" in row["contender"]):
                setting = row["surrogate"], row["reset"]
                found = float(row["times_as_fast"]), f"{row['contender']}; {row['surrogate']}, {row['reset']}"
                best[setting] = max(found, best.get(setting, found))
        return min(best.values(), default=None)

    return figure


def time(what: str, baseline: str, column: str, limit: float, dtype: str = "float32") -> Claim:
    text = f"{what}: time, {dtype}, relative to {baseline}"
    return Claim(text, limit, "peers_nf_resnet_34", lowest(what, column, dtype=dtype))


def peak(baseline: str, column: str, limit: float, tensors: str, size: str) -> Claim:
    text = f"SLTT: peak memory, {size}, relative to {baseline}"
    return Claim(text, limit, "peers_memory", lowest("SLTT", column, tensors=tensors, network="NF-ResNet-34"))


SKIPPED = "SLTT-1, tail skipped"
LIMITS = {
    ("BPTT, steps", "to_bptt_steps"): (0.55, 0.25, 0.30),
    ("BPTT, sequence", "to_bptt_sequence"): (0.92, 0.45, 0.52),
    ("SpikingJelly's loop, same K", "to_spikingjelly"): (0.55, 0.50, 0.58),
}
NODE = "the neuron alone, times as fast as SpikingJelly's SLTTLIFNode"
CLAIMS = (
    *(
        time(what, baseline, column, limit)
        for (baseline, column), limits in LIMITS.items()
        for what, limit in zip(("SLTT", SKIPPED, "SLTT-1"), limits)
    ),
    time(SKIPPED, "BPTT, sequence", "to_bptt_sequence", 0.5, "bfloat16"),
    peak("BPTT, steps", "to_bptt_steps", 0.07, "fake", "256 images of 224 px"),
    peak("SpikingJelly's loop", "to_spikingjelly", 0.30, "fake", "256 images of 224 px"),
    peak("BPTT, steps", "to_bptt_steps", 0.13, "real", "32 images of 96 px"),
    Claim("SLTT: growth of the peak from T = 4 to T = 32", 0.01, "peers_over_time", growth),
    Claim(f"{NODE}, eager", 3, "neuron", neuron(compiled=False), at_least=True),
    Claim(f"{NODE}, compiled", 5, "neuron", neuron(compiled=True), at_least=True),
)
