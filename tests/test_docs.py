import csv
import importlib.util
import re
import statistics
import subprocess
import sys
from pathlib import Path

import alive
import modules
import paired
import pytest
from spikingjelly.activation_based import base

ROOT = Path(__file__).parent.parent
READ_OUT = ("readout",)  # layers in the documentation whose potential is read


OPTIONAL = r"accelerate|onnxscript|timm|tonic|transformers|spikingjelly\.activation_based\.nir_exchange"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [
        "index.md",
        "fit.md",
        "over-time.md",
        "recipes.md",
        "spikingjelly.md",
        "snntorch.md",
        "bring-your-code.md",
        "own-neurons.md",
        "analysis.md",
    ],
)
@pytest.mark.filterwarnings("ignore:the trainer calls the network for each time step")
def test_examples_run_as_printed_from_top_to_bottom_and_their_networks_learn(page, monkeypatch):
    names, seen = {}, alive.Seen(monkeypatch)
    if page == "bring-your-code.md" and not hasattr(base.MemoryModule, "single_step_functional_forward"):
        pytest.skip("the old package itself asks for CuPy, and SpikingJelly 0.0.0.0.14 still has it")
    for example in blocks(page, "python"):
        tools = re.findall(rf"^from ({OPTIONAL})\b", example, re.MULTILINE)
        if all(map(importlib.util.find_spec, tools)):
            exec(example, names)
    monkeypatch.undo()
    assert seen.networks
    for net, iteration in seen.networks.items():
        alive.check(net, iteration, READ_OUT, learns=page != "analysis.md")


def test_the_time_loop_of_a_tutorial_leaves_forward_with_three_new_lines():
    (diff,) = blocks("snntorch.md", "diff")
    before, after = (block for block in blocks("snntorch.md", "python") if "def forward" in block)
    lines = {sign: [line[1:] for line in diff.splitlines() if line[0] == sign] for sign in "-+ "}
    assert len(lines["+"]) == 3
    assert all(line in before for line in lines["-"])
    assert all(line in after for line in lines["+"] + lines[" "])


def test_every_case_leads_to_code_that_runs():
    """Each row of the table in "Published code" has a section, there or in "Neurons of your own", with a block of code in it."""
    pages = {name: (ROOT / "docs" / name).read_text() for name in ("bring-your-code.md", "own-neurons.md")}
    table = pages["bring-your-code.md"].partition("## Find your case")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    with_code = {
        (name, re.sub(r"[^a-z0-9 -]", "", section.splitlines()[0].lower()).replace(" ", "-"))
        for name, page in pages.items()
        for section in re.split(r"^##+ ", page, flags=re.MULTILINE)[1:]
        if "```python" in section
    }
    assert len(rows) >= 10
    for row in rows:
        name, anchor = re.search(r"\(([\w.-]*)#([\w-]+)\)", row).groups()
        assert (name or "bring-your-code.md", anchor) in with_code, row


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--sltt"]], ids=["BPTT", "SLTT"])
def test_a_script_of_ones_own_learns(options):
    """The same script with and without the one line."""
    command = [sys.executable, ROOT / "examples" / "any_script" / "train.py", "--epochs", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout.split()[-2]) > 80


@pytest.mark.slow
def test_the_snntorch_example_runs():
    command = [
        sys.executable,
        ROOT / "examples" / "snntorch" / "train.py",
        "--epochs",
        "1",
        "--time-steps",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("%")) == (0, 4), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("network", ["sew_resnet18", "resnet18"])
def test_the_example_with_an_existing_network_runs(network):
    script = ROOT / "examples" / "wrap_existing" / "train.py"
    command = [sys.executable, script, network, "--images", "64", "--epochs", "1", "--time-steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("test accuracy")) == (0, 1), done.stderr


def test_every_module_is_in_the_table():
    page = (ROOT / "docs" / "spikingjelly.md").read_text()
    for case in [*modules.FUSED, *modules.GENERIC, *modules.SEQUENCES, *modules.REFUSED]:
        stem = re.sub(r"[23]d$", "1d", case.name) if "BatchNorm" in case.name else case.name
        assert f"`{stem}`" in page, case.name


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_changes_one_line():
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert [line[0] for line in diff.splitlines() if line[0] != " "] == ["+"]


def results(name):
    with (ROOT / "benchmarks" / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_variances_of_draws_in_the_docs_are_the_measured_ones():
    page = (ROOT / "docs" / "method.md").read_text()
    draws = {}
    for row in results("draws"):
        if row["state"] == "trained":
            draws.setdefault((row["network"], row["time_steps"], row["k"]), {})[row["schedule"]] = row
    for case, rows in draws.items():
        random, *others = (rows[name] for name in ("random", "stratified", "early"))
        figures = [f"{float(random['variance']):.2f}", random["forward_steps"]]
        for row in others:
            figures += [
                f"{float(row['relative_variance']):.2f}",
                row["forward_steps"],
                f"{float(row['relative_seconds']):.2f}",
            ]
        assert " | ".join([f"| {case[0]}", *case[1:], *figures]) in page


REMEDIES = {
    "step": "each step's own statistics", "chunk=T/2": "`chunk=T/2`", "first pass in replay": "those over all steps of the first pass, in backward only",
    "two passes": "two passes", "three passes": "three passes", "seen so far": "steps seen so far", "half-life of a step": "moving average over steps",
    "running": "running statistics", "running, no moments": "running statistics, no gradient through them", "latest iteration": "latest iteration",
    "whole pass first": "`norms=\"sequence\"`", "whole pass first, no moments": "the same, no gradient through the statistics",
    "whole pass first, two backward": "the same, two backward passes",
}  # fmt: skip
NORMS = ("step", "two passes", "seen so far", "running", "whole pass first")


def norms_over_time_tables():
    """Rows of the tables of "Norms over time"."""
    cosines = {}
    for row in results("norms_over_time"):
        key = row["network"], row["batch"], row["method"]
        if row["set"] == "images":
            cosines.setdefault(key, {})[row["trained"]] = float(row["cosine"])
    places = dict.fromkeys(key[:2] for key in cosines)
    pairs = {key: f"{both['False']:.3f}; {both['True']:.3f}" for key, both in cosines.items()}
    gradients = [[*place, *(pairs[(*place, method)] for method in NORMS)] for place in places]
    memory = [
        [row[column] for column in ("network", "time_steps", "step", "sequence", "chunk=T")]
        for row in results("norms_over_time_memory")
    ]
    runs = {}
    for row in results("norms_over_time_accuracy"):
        runs.setdefault((row["set"], row["method"]), []).append(100 * float(row["test_accuracy"]))
    reached = {
        key: f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"
        for key, values in runs.items()
    }
    accuracy = [
        [
            label,
            str(len(runs[name, "step"])),
            *(reached[name, method] for method in ("step", "whole pass first", "chunk=T")),
        ]
        for name, label in {"event digits": "event digits", "images": "CIFAR-10"}.items()
    ]
    by_method = {}
    for row in results("norms_over_time"):
        by_method.setdefault(row["method"], []).append(float(row["cosine"]))
    remedies = [
        [
            label,
            f"{sum(a > b for a, b in zip(by_method[name], by_method['step'], strict=True))} of {len(by_method[name])}",
            f"{statistics.median(by_method[name]):.3f}",
            f"{min(by_method[name]):.3f}",
        ]
        for name, label in REMEDIES.items()
    ]
    return {"gradients": gradients, "remedies": remedies, "memory": memory, "accuracy": accuracy}


@pytest.mark.parametrize("table", ["gradients", "remedies", "memory", "accuracy"])
def test_figures_of_norms_over_time_in_the_docs_are_the_measured_ones(table):
    page = (ROOT / "docs" / "norms.md").read_text()
    marked = re.search(rf"<!-- norms: {table} -->\n(.*?)<!-- end -->", page, re.DOTALL)[1]
    rows = [f"| {' | '.join(row)} |" for row in norms_over_time_tables()[table]]
    assert marked.strip().splitlines()[2:] == rows


def test_statistics_of_all_steps_bring_the_gradient_nearer():
    """But for the smallest batch of one network."""
    page = (ROOT / "docs" / "norms.md").read_text()
    errors = {"step": [], "whole pass first": []}
    for row in results("norms_over_time"):
        errors.get(row["method"], []).append(100 * float(row["output_error"]))
    assert f"{min(errors['step']):.0f} to {max(errors['step']):.0f} % off" in page
    assert not any(errors["whole pass first"])
    cosines = {}
    for row in results("norms_over_time"):
        key = row["set"], row["network"], row["trained"], row["batch"]
        cosines.setdefault(row["method"], {})[key] = float(row["cosine"])
    nearer = [cosines["whole pass first"][key] > cosine for key, cosine in cosines["step"].items()]
    assert sum(nearer) >= len(nearer) - 1
    assert min(cosines["whole pass first"].values()) > 0.94


def test_figures_of_where_sltt_fits_are_the_measured_ones():
    page = " ".join((ROOT / "docs" / "fit.md").read_text().split())
    cosines = {
        row["tau"]: row["cosine"]
        for row in results("similarity")
        if (row["time_steps"], row["detach_reset"]) == ("6", "False")
    }
    assert f"the cosine is {cosines['1.1']} for tau = 1.1 and {cosines['8.0']} for tau = 8, at T = 6" in page
    (hidden,) = (row for row in results("memory_tasks_similarity") if row["task"].endswith("delay 20"))
    figures = (
        f"{hidden['cosine']} before training, {hidden['cosine_of_first_layer']} for the layer that reads"
    )
    assert figures in page
    (pixels,) = (row for row in results("memory_tasks_similarity") if row["task"] == "digits pixel by pixel")
    runs = paired.paired([row for row in results("memory_tasks") if row["task"] == pixels["task"]])
    behind = f"{-runs['SLTT'].interval.mean:.0f} points behind"
    assert f"{pixels['cosine_of_first_layer']} for that layer, and SLTT is {behind}" in page


@pytest.mark.parametrize("name", ["digits", "event_digits"])
def test_where_each_step_shows_what_is_asked_sltt_is_not_told_apart_from_bptt(name):
    runs = paired.paired([row for row in results(f"accuracy_{name}") if row["scale"] == "mean"])["SLTT"]
    assert len(runs.accuracies) >= 5
    assert runs.interval.holds_zero
    assert abs(runs.interval.mean) < 0.5


def test_where_sltt_is_at_chance_a_window_that_covers_the_delay_learns_with_less_memory():
    runs = {}
    for row in results("memory_tasks"):
        if row["neuron"] == "Leaky" and row["task"].endswith("delay 20"):
            runs.setdefault(row["method"], []).append(row)
    accuracy = {method: [float(row["test_accuracy"]) for row in rows] for method, rows in runs.items()}
    peak = {method: float(rows[0]["peak_activation_kb"]) for method, rows in runs.items()}
    assert max(accuracy["SLTT"]) < 0.3
    assert max(accuracy["window 12"]) < 0.35
    assert min(accuracy["window 24"] + accuracy["BPTT"]) >= 0.95
    assert peak["window 24"] < 0.6 * peak["BPTT"]


def test_what_brings_the_gradients_apart_on_colour_images_is_tau():
    page = " ".join((ROOT / "docs" / "reproduce.md").read_text().split())
    trained = {
        row["variant"]: row for row in results("accuracy_causes_similarity") if row["iterations"] == "40"
    }
    cosine = {variant: float(row["cosine"]) for variant, row in trained.items()}
    own, *same, quicker, slower = cosine.values()
    shorter = 1 - float(next(iter(trained.values()))["norm_ratio"])
    assert f"a cosine of {own:.3f} after 40 iterations. SLTT's is {shorter:.0%}".replace("%", " %") in page
    assert all(abs(each - own) < 0.002 for each in same)
    assert own > quicker > slower
    assert f"with tau = 2 the cosine is {cosine['tau = 2']:.3f}" in page


def test_sltt_is_behind_where_spikes_are_counted_and_not_where_membranes_are_read():
    by_spikes, by_membranes = (
        paired.paired(results("readout"), column=f"accuracy_by_{read}")["SLTT"].interval
        for read in ("spikes", "membranes")
    )
    assert by_spikes.mean < 0
    assert not by_spikes.holds_zero
    assert by_membranes.holds_zero


def test_the_longer_the_window_the_better_where_a_task_needs_memory():
    for part in ("row", "pixel"):
        runs = [row for row in results("memory_tasks") if row["task"] == f"digits {part} by {part}"]
        sltt, smaller, larger = [
            each.interval for method, each in paired.paired(runs).items() if method != "BPTT"
        ]
        assert sltt.mean < smaller.mean < larger.mean < 0
        assert not larger.holds_zero


def test_runs_of_a_recurrent_network_that_learned_are_counted():
    page = " ".join((ROOT / "docs" / "fit.md").read_text().split())
    recurrent = [row for row in results("memory_tasks") if row["neuron"] == "RLeaky"]
    larger, sltt = (
        [float(row["test_accuracy"]) for row in recurrent if row["method"] == method]
        for method in ("window 12", "SLTT")
    )
    learned = sum(accuracy >= 0.9 for accuracy in larger)
    assert f"reaches 90 % in {learned} of {len(larger)} runs" in page
    assert max(sltt) < 0.3


def test_the_trainer_costs_next_to_nothing():
    assert all(float(row["median_ratio"]) <= 1.02 for row in results("trainer_overhead"))


def test_the_readmes_table_is_the_measured_one():
    readme = (ROOT / "README.md").read_text()
    for row in results("digits"):
        accuracy, seconds = float(row["mean_test_accuracy"]), float(row["seconds_per_epoch"])
        ratio, memory = float(row["time_relative_to_bptt"]), float(row["peak_activation_mb"])
        assert f"| {row['method']} | {accuracy:.1%} | {seconds:.2f} | {ratio:.2f} | {memory:.1f} |" in readme


def test_measured_accuracy_and_time_hold_what_is_claimed():
    by_method = {row["method"]: row for row in results("digits")}
    accuracy = {method: float(row["mean_test_accuracy"]) for method, row in by_method.items()}
    assert accuracy["SLTT"] >= accuracy["BPTT"] - 0.01
    assert accuracy["SLTT-2"] >= accuracy["BPTT"] - 0.01
    assert accuracy["SLTT-1"] >= accuracy["BPTT"] - 0.02
    assert float(by_method["SLTT-1"]["time_relative_to_bptt"]) <= 0.6


def test_similarity_falls_as_tau_and_t_grow():
    page = (ROOT / "docs" / "analysis.md").read_text()
    through, detached, by_tau = [], [], {}
    for row in results("similarity"):
        if row["detach_reset"] == "False":
            by_tau.setdefault(float(row["tau"]), []).append(float(row["cosine"]))
        if row["time_steps"] == "6":
            (detached if row["detach_reset"] == "True" else through).append(row)
    for own, other in zip(through, detached, strict=True):
        figures = [
            own["cosine"],
            own["norm_ratio"],
            other["cosine"],
            other["norm_ratio"],
            own["test_accuracy"],
        ]
        assert f"| {float(own['tau']):g} | {' | '.join(figures)} |" in page
    for rows in (through, detached):
        cosines = [float(row["cosine"]) for row in rows]
        assert cosines == sorted(cosines, reverse=True)
    assert all(cosines == sorted(cosines, reverse=True) for cosines in by_tau.values())
    assert float(through[0]["cosine"]) > 0.99


def test_time_and_memory_of_a_network_over_time_are_the_measured_ones():
    page = " ".join((ROOT / "docs" / "over-time.md").read_text().split())
    ratios = {row["method"]: float(row["median_ratio"]) for row in results("over_time")}
    mib = {row["time_steps"]: float(row["peak_mib"]) for row in results("over_time_memory")}
    everything = ratios["SLTT, room for all graphs"]
    assert f"takes {ratios['SLTT']:.2f} times as long as `OnlineTrainer`" in page
    assert (
        f"with `k=1` {ratios['SLTT-1']:.2f} times, and with room for all graphs {everything:.2f} times"
        in page
    )
    assert f"{mib['1']:.0f} MiB at T = 1, and {mib['2']:.0f} MiB at T = 2, 6 and 32" in page
    assert mib["2"] == mib["6"] == mib["32"] <= 1.06 * mib["1"]  # one step carries no state
    assert ratios["SLTT"] <= 1.35
    assert ratios["SLTT-1"] <= 1.15
    assert everything <= 1.05


def test_time_of_compiled_networks_is_the_measured_one():
    page = " ".join((ROOT / "docs" / "scaling.md").read_text().split())
    rows = {row["contender"]: row for row in results("compiled")}
    whole, one = (
        f"{float(rows[name]['of_compiled_bptt']):.2f}"
        for name in ("SLTT, chunk=T, compiled", "SLTT, compiled")
    )
    kept = f"{float(rows['SLTT, chunk=T, compiled']['of_layout_kept']):.2f}"
    assert f"takes {whole} of compiled BPTT's time with `chunk=T`, and {one} with one step a call" in page
    assert (
        f'`torch.compile(net, options={{"layout_optimization": False}})` has BPTT do the same, and then it is {kept}'
        in page
    )


def test_memory_block_by_block_is_as_counted():
    page = (ROOT / "docs" / "time-and-memory.md").read_text()
    rows = {(row["network"], row["contender"]): float(row["to_bptt_steps"]) for row in results("blocks")}
    for network in dict.fromkeys(network for network, _ in rows):
        bits, least = (rows[network, f"SLTT, {name}"] for name in ("spikes as bits", 'memory_budget="least"'))
        pattern = rf"{least:.2f}(?: of BPTT's memory)? in the place of {bits:.2f}"
        assert re.search(pattern, page), network


def test_the_counts_of_the_fuzzer_are_the_measured_ones():
    readme = " ".join((ROOT / "README.md").read_text().split())
    rows = [row for row in results("fuzz") if row["state"] == "trainer and over_time and windows"]
    cases = sum(int(row["cases"]) for row in rows)
    wrong = sum(int(row[name]) for row in rows for name in row if name.startswith("wrong_"))
    assert f"compared {cases:,} random networks" in readme
    assert f"It found {wrong} that differed" in readme


def test_times_of_plans_are_the_measured_ones():
    pages = {
        name: " ".join((ROOT / "docs" / f"{name}.md").read_text().split())
        for name in ("benchmarks", "time-and-memory")
    }
    rows = {(row["network"], row["contender"]): row for row in results("planner")}

    def both(contender):
        row = rows["NF-ResNet-34", contender]
        return [f"{float(row[column]):.2f}" for column in ("to_bptt_steps", "to_bptt_sequence")]

    fastest, least = both("SLTT, multi-step, fastest"), both("SLTT, multi-step, least")
    told = f"takes {fastest[0]} of the time of BPTT step by step and {fastest[1]} of BPTT in one call"
    floor = both("convolutions alone, T in a call")
    assert f"{told}. There, the convolutions alone take {floor[0]} and {floor[1]}." in pages["benchmarks"]
    skipped = both("SLTT-1, tail skipped, multi-step")
    assert f"with `full_output=False` takes {skipped[0]} and {skipped[1]}." in pages["benchmarks"]
    assert all(f"takes {least[0]} of the time of BPTT step by step" in page for page in pages.values())
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"on another CPU it is {fastest[0]}, and {skipped[0]} for SLTT-1" in readme
    other = float(rows["spiking ResNet-18", "SLTT, multi-step, least"]["to_bptt_steps"])
    assert f"and {other:.2f} for ResNet-18" in pages["time-and-memory"]


def test_time_and_memory_of_windows_are_the_measured_ones():
    page = " ".join((ROOT / "docs" / "training.md").read_text().split())
    rows = {row["contender"]: row for row in results("windows")}
    mib = {name: f"{float(row['peak_mib']):.0f}" for name, row in rows.items()}
    whole, own = float(rows["window 4 (BPTT)"]["ratio"]), mib["the framework's BPTT"]
    assert f"takes {whole:.2f} of the framework's own time" in page
    assert f"{mib['window 4 (BPTT)']} MiB in the place of {own};" in page
    assert f"windows of 2 take {mib['window 2']} MiB, and SLTT {mib['window 1 (SLTT)']}" in page
    assert whole <= 1.0
