"""The tables of accuracies in docs/reproduce.md and docs/fit.md, paired over seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from paired import Interval, Paired, paired

from peers.markdown import MISSING, Rows, figure, results, spread, table

SETS = {
    "digits": "digits",
    "event_digits": "event digits",
    "images": "CIFAR-10, 10,000 training images",
}
"""Set of the accuracy benchmark -> what the docs call it."""


def differences() -> dict[str, dict[str, Paired]]:
    """Of the accuracy benchmark: set -> method -> its runs beside BPTT's."""
    return {
        name: paired([row for row in results(f"accuracy_{name}") if row["scale"] == "mean"]) for name in SETS
    }


def accuracy() -> str:
    """A row for each method on each set: accuracy, and the paired difference to BPTT."""
    return table(
        ["data", "method", "seeds", "test accuracy", "difference to BPTT"],
        (
            [
                SETS[name],
                method,
                str(len(runs.accuracies)),
                spread(runs.accuracies),
                "" if method == "BPTT" else str(runs.interval or ""),
            ]
            for name, methods in differences().items()
            for method, runs in methods.items()
            if runs.accuracies
        ),
    )


def accuracy_in_words() -> str:
    """An item for each set: which methods are below BPTT or above it, and which are not told apart from it."""
    items = []
    for name, methods in differences().items():
        found: dict[str, list[str]] = {}
        for method, runs in methods.items():
            if method != "BPTT" and runs.interval is not None:
                found.setdefault(_side(runs.interval), []).append(f"{method} ({runs.interval})")
        said = [f"{side} {', '.join(found[side])}" for side in SIDES if side in found]
        if said:
            items.append(f"- *{SETS[name]}*: {'; '.join(said)}.")
    return "\n".join(items) + "\n" if items else MISSING


SIDES = ("below BPTT:", "above BPTT:", "not told apart from BPTT:")


def _side(found: Interval) -> str:
    if found.holds_zero:
        return SIDES[2]
    return SIDES[0] if found.mean < 0 else SIDES[1]


def accuracy_of_sltt() -> str:
    """A row for each set: BPTT and SLTT."""
    return table(
        ["data", "seeds", "BPTT", "SLTT", "difference"],
        (
            [
                SETS[name],
                str(len(runs["SLTT"].accuracies)),
                f"{runs['SLTT'].baseline_mean:.2f}",
                f"{runs['SLTT'].mean:.2f}",
                str(runs["SLTT"].interval or ""),
            ]
            for name, runs in differences().items()
            if "SLTT" in runs and runs["SLTT"].accuracies
        ),
    )


def causes_similarity() -> str:
    """Of SLTT's and BPTT's gradient on the images, as one setting is changed: at the start, and after some iterations."""
    by_variant: dict[str, Rows] = {}
    for row in results("accuracy_causes_similarity"):
        by_variant.setdefault(row["variant"], []).append(row)
    return table(
        [
            "changed",
            "cosine at the start",
            "after 40 iterations",
            "ratio of norms at the start",
            "after 40 iterations",
        ],
        (
            [variant, *(row[column] for column in ("cosine", "norm_ratio") for row in rows)]
            for variant, rows in by_variant.items()
        ),
    )


def causes() -> str:
    """SLTT beside BPTT, as one setting is changed in both: accuracy, and the loss of the last epoch; nothing before it is measured."""
    rows = results("accuracy_causes")
    cells, apart = [], []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        accuracy = paired(own).get("SLTT")
        if accuracy is None or not accuracy.accuracies:
            continue
        loss = paired(own, column="training_loss", factor=1)["SLTT"]
        if loss.interval and not loss.interval.holds_zero:
            apart.append(variant)
        cells.append(
            [
                variant,
                str(len(accuracy.accuracies)),
                f"{accuracy.baseline_mean:.2f}",
                f"{accuracy.mean:.2f}",
                str(accuracy.interval or ""),
                loss.interval.text(3) if loss.interval else "",
            ]
        )
    if not cells:
        return ""
    header = ["changed", "seeds", "BPTT", "SLTT", "difference", "difference of the training loss"]
    found = f"The training losses of the two differ by more than the interval with: {', '.join(apart) or 'none of these'}. The other runs do not tell the two apart."
    return f"{CAUSES}\n\n{table(header, cells)}\n\n{found}"


CAUSES = """The next table is from training on 2,500 of the images for 8 epochs, with one setting changed in both methods
(`benchmarks/accuracy_causes.py accuracy`). The last column is the loss of the last epoch, SLTT's minus BPTT's:"""


def accuracy_cost() -> str:
    """Time and memory of an iteration of each method on each set."""
    columns = ("method", "seconds", "relative_seconds", "peak_mb", "relative_peak")
    return table(
        ["data", "method", "seconds", "relative to BPTT", "peak MB", "relative to BPTT"],
        ([SETS[row["set"]], *(row[column] for column in columns)] for row in results("accuracy_cost")),
    )


def accuracy_by_scale() -> str:
    """SLTT-K with either scale, of the seeds that both have."""
    rows = []
    for name, label in SETS.items():
        runs: dict[tuple[str, str], dict[str, float]] = {}
        for row in results(f"accuracy_{name}"):
            percent = 100 * float(row["test_accuracy"])
            runs.setdefault((row["method"], row["scale"]), {})[row["seed"]] = percent
        for method in sorted(method for method, scale in runs if scale == "paper"):
            paper, mean = runs[method, "paper"], runs.get((method, "mean"), {})
            shared = [seed for seed in paper if seed in mean]
            if shared:
                cells = (spread(by_seed[seed] for seed in shared) for by_seed in (mean, paper))
                rows.append([label, method, str(len(shared)), *cells])
    return table(["data", "method", "seeds", '`scale="mean"`', '`scale="paper"`'], rows)


def readout() -> str:
    """The tutorial's readout: a row for each method, read from spikes and from membranes."""
    columns = {"spikes": "accuracy_by_spikes", "membranes": "accuracy_by_membranes"}
    read = {name: paired(results("readout"), column=column) for name, column in columns.items()}
    return table(
        [
            "method",
            "seeds",
            *(f"{what} by {name}" for name in columns for what in ("accuracy", "difference to BPTT")),
        ],
        (
            [
                method,
                str(len(runs.accuracies)),
                *(
                    cell
                    for name in columns
                    for cell in (
                        spread(read[name][method].accuracies, 1),
                        "" if method == "BPTT" else str(read[name][method].interval or ""),
                    )
                ),
            ]
            for method, runs in read["spikes"].items()
        ),
    )


ACCURACY_TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "accuracy in words": accuracy_in_words,
    "accuracy.png": partial(
        figure,
        "accuracy.png",
        "accuracy_digits",
        "Difference of each method's test accuracy to BPTT's, with 95 % intervals: digits, event digits and colour images above, tasks that need memory below",
    ),
    "accuracy cost": accuracy_cost,
    "accuracy by scale": accuracy_by_scale,
    "accuracy of SLTT": accuracy_of_sltt,
    "causes": causes,
    "causes, similarity": causes_similarity,
    "readout": readout,
}
"""Name in the page's marker -> what renders it."""
