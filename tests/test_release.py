"""What a release and its checks are made of agrees with itself."""

import re
from pathlib import Path

import pytest
import yaml

import sltt_ext

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]


def jobs(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())["jobs"]


def commands(workflow):
    """What a workflow runs, once for each entry of its matrix."""
    for job in jobs(workflow.name).values():
        matrix = job.get("strategy", {}).get("matrix", {})
        entries = (
            matrix.get("include")
            or [{key: value} for key, values in matrix.items() for value in values]
            or [{}]
        )
        for entry in entries:
            for step in job.get("steps", []):
                command = step.get("run", "")
                for key, value in entry.items():
                    command = command.replace(f"${{{{ matrix.{key} }}}}", value)
                yield command


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_make_targets_and_nox_sessions_that_exist(workflow):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    noxfile = (ROOT / "noxfile.py").read_text()
    sessions = set(re.findall(r"^def ([a-z]\w*)\(session", noxfile, re.MULTILINE))
    lines = re.findall(r'^    "([\w-]+)": \[', noxfile, re.MULTILINE)
    sessions |= {f"tests({line})" for line in lines}
    called = list(commands(workflow))
    made = {name for command in called for name in re.findall(r"^make ([\w-]+)", command)}
    run = {name for command in called for name in re.findall(r'^nox -s "?([\w()-]+)', command)}
    assert made | run
    assert made <= targets
    assert run <= sessions


def test_every_python_that_is_claimed_is_tested():
    claimed = re.findall(
        r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text()
    )
    tested = {
        entry["python"]
        for entry in jobs("checks.yml")["nox"]["strategy"]["matrix"]["include"]
        if entry["session"].startswith("tests")
    }
    assert set(claimed) == tested


def test_only_the_job_that_uploads_may_and_it_comes_after_all_checks():
    release = jobs("release.yml")
    allowed = [name for name, job in release.items() if "id-token" in job.get("permissions", {})]
    assert allowed == ["publish"]
    assert (release["publish"]["needs"], release["build"]["needs"]) == ("build", "checks")


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_issue_forms_ask_for_the_environment(form):
    fields = {field.get("id"): field for field in yaml.safe_load(form.read_text())["body"]}
    assert "`sltt env`" in fields["environment"]["attributes"]["label"]
    assert fields["environment"]["validations"] == {"required": True}


def test_the_version_is_written_once():
    written = [
        path.name
        for path in (ROOT / "pyproject.toml", ROOT / "CITATION.cff", ROOT / "README.md", ROOT / "mkdocs.yml")
        if re.search(rf"version\W+{re.escape(sltt_ext.__version__)}", path.read_text())
    ]
    assert written == []
