import csv
import itertools
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gpu_proof
import measured_cells
import pytest
from measured_cells import Cell
from peers import on_device, workers
from peers.networks import SPIKING_RESNET18

ROOT = Path(__file__).parents[1]
FOREVER = float("inf")


def rows(cells, seconds=FOREVER):
    end = time.monotonic() + seconds
    found = workers.rows_of(cells, measured_cells.measure, lambda: end - time.monotonic())
    return [row for _, row in found]


@pytest.mark.parametrize(
    ("does", "status"),
    [
        ("crash", "failed: its process ended with 7"),
        ("hang", "over its limit of 0.5 s"),
        ("poison", "failed: CUDA error: an illegal memory access"),
    ],
)
def test_what_ends_a_process_is_a_row_and_the_next_cell_has_another_process(does, status):
    first, bad, last = rows([Cell("run"), Cell(does, limit=0.5 if does == "hang" else 30), Cell("run")])
    assert bad["status"] == status
    assert first["process"] != last["process"]
    assert last["status"] == ""


def test_cells_share_a_process_unless_they_need_other_variables():
    first, second, other = rows([Cell("run"), Cell("run"), Cell("run", environment=(("MEASURED", "yes"),))])
    assert first["process"] == second["process"] != other["process"]
    assert [first["variable"], other["variable"]] == ["", "yes"]


def test_a_cell_that_the_time_for_all_cuts_short_has_no_row():
    assert rows([Cell("hang")], seconds=0.5) == []


def cell(**changes):
    fields = {"network": SPIKING_RESNET18.name, "batch": 2, "dtype": "float32", "entrant": "BPTT, sequence", "device": "cpu", "tiny": True}  # fmt: skip
    return on_device.Cell(**{**fields, **changes})


def test_out_of_memory_is_a_row(monkeypatch):
    monkeypatch.setattr(on_device, "_time_and_memory", measured_cells.out_of_memory)
    row = on_device.measured(cell())
    assert row["status"] == "out of memory"
    assert row["milliseconds"] == ""


def test_an_error_is_a_row_with_its_reason():
    row = on_device.measured(cell(entrant="nobody"))
    assert row["status"].startswith("failed: StopIteration")


def test_rows_of_all_outcomes_have_the_same_columns():
    assert list(on_device.measured(cell())) == list(cell().row("out of memory"))


def test_every_contender_has_a_cell_for_every_network_batch_and_dtype_on_a_device():
    cells, refused = on_device.cells("cuda")
    sizes = {(one.network, one.batch, one.dtype) for one in cells}
    assert sizes == set(
        itertools.product([n.name for n in on_device.NETWORKS], on_device.BATCHES, on_device.PRECISIONS)
    )
    names = {entrant.name for entrant in on_device.entrants(SPIKING_RESNET18)} - refused.keys()
    assert {one.key for one in map(_Keyed, cells)} == set(itertools.product(*_all(names)))
    assert set(refused.values()) <= {"OnlineTrainer has no graph= in this version"}


def _all(names):
    return [n.name for n in on_device.NETWORKS], on_device.BATCHES, on_device.PRECISIONS, names


class _Keyed:
    def __init__(self, one):
        self.key = tuple(one.key.values())


def test_launches_are_counted_once_for_each_network_and_contender():
    cells = on_device.launch_cells(on_device.cells("cuda")[0])
    assert {one.batch for one in cells} == {8}
    assert len({(one.network, one.entrant) for one in cells}) == len(cells) > 4


def test_wheels_of_a_folder_are_installed_as_they_are(tmp_path):
    wheel = tmp_path / "lonely-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("lonely.py", "")
        about = "Metadata-Version: 2.1\nName: lonely\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found\n"
        file.writestr("lonely-1.0.dist-info/METADATA", about)
        file.writestr(
            "lonely-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr("lonely-1.0.dist-info/RECORD", "")
    gpu_proof.with_wheels(tmp_path, tmp_path / "site")
    assert (tmp_path / "site" / "lonely.py").exists()


def test_a_folder_without_wheels_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no wheel"):
        gpu_proof.with_wheels(tmp_path, tmp_path / "site")


def test_what_is_missing_is_said_with_what_it_costs(monkeypatch):
    monkeypatch.setattr(gpu_proof.importlib.util, "find_spec", lambda name: None)
    assert (
        "spikingjelly is missing, so without: the networks, and tests of whole networks"
        in gpu_proof.missing()
    )


def test_without_spikingjelly_the_networks_are_left_out_and_that_is_not_good(tmp_path):
    (tmp_path / "spikingjelly.py").write_text("raise ModuleNotFoundError('No module named loguru')")
    options = gpu_proof.Options("cpu", tmp_path, {"PYTHONPATH": str(tmp_path)})
    outcome = gpu_proof.Networks().run(options, 10)
    assert not outcome.good
    assert "No module named loguru" in outcome.text


def test_a_section_that_is_cut_short_leaves_no_process_behind(tmp_path):
    pid = tmp_path / "pid"
    code = (
        f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    options = gpu_proof.Options("cpu", tmp_path, {})
    done = gpu_proof.ended([sys.executable, "-c", code], options, 2)
    assert done.code is None
    assert not Path("/proc", pid.read_text()).exists()


def test_sections_share_the_time_and_the_last_has_what_is_left(tmp_path):
    given = []

    def run(options, seconds):
        given.append(seconds)
        return gpu_proof.Outcome("done")

    chosen = [gpu_proof.Section("one", 5, run), gpu_proof.Section("two", FOREVER, run)]
    gpu_proof.run_all(gpu_proof.Options("cpu", tmp_path, {}), 20, chosen)
    assert given[0] == 5
    assert 15 < given[1] <= 20
    with (tmp_path / "gpu_proof.csv").open() as file:
        assert [row["outcome"] for row in csv.DictReader(file)] == ["done", "done"]


def dry_run(*options):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_proof.py"), "--dry-run", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_dry_run_writes_no_results():
    done = dry_run("--output", str(ROOT / "benchmarks" / "results"))
    assert done.returncode != 0
    assert "figures mean nothing" in done.stderr


@pytest.mark.slow
def test_a_dry_run_goes_through_every_section_and_contender(tmp_path):
    done = dry_run("--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "gpu_networks.csv").open() as file:
        measured = list(csv.DictReader(file))
    cells, refused = on_device.cells("cpu", tiny=True)
    assert len(measured) == len(cells)
    assert {row["status"] for row in measured} == {""}
    names = {entrant.name for entrant in on_device.entrants(SPIKING_RESNET18)}
    assert {row["contender"] for row in measured} | refused.keys() == names
    assert all(f"left out: {name}" in done.stdout for name in refused)
    with (tmp_path / "gpu_proof.csv").open() as file:
        sections = {row["section"]: row["outcome"] for row in csv.DictReader(file)}
    assert list(sections) == [section.name for section in gpu_proof.sections()]
    assert sections["kernels"] == "done"
