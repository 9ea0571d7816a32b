from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from kdlib.apps.cli import parser
from kdlib.apps.notebooks import read_parameters
from kdlib.apps.study import BY_DEFAULT, plan

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"] + EXTRAS["dev"] + EXTRAS["deploy"]]
LOCK_LINES = re.sub(r"\\\n", "", (ROOT / "requirements.lock").read_text()).splitlines()[1:]  # [0] is a comment
LOCKED = [Requirement(line.partition("--hash")[0]) for line in LOCK_LINES]


def lock(python: str | None = None) -> dict[str, str]:
    """Name -> version on that Python (this one by default), on Linux."""
    versions = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    if python:
        versions |= {"python_version": python, "python_full_version": f"{python}.9"}
    chosen = [line for line in LOCKED if line.marker is None or line.marker.evaluate(versions)]
    assert len({line.name for line in chosen}) == len(chosen)
    return {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in chosen}


LOCK = lock()
PYTHONS = ["3.11", "3.12", "3.13"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


requires = functools.cache(importlib.metadata.requires)


def required(python: str) -> set[str]:
    """All that `.[dev,deploy]` needs on that Python, over every installed package; PyTorch pins what CUDA needs."""
    found, seen, queue = set(), set(), list(REQUIREMENTS)
    while queue:
        requirement = queue.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        if name.startswith(("nvidia-", "cuda-", "triton")) or (name, *sorted(extras)) in seen:
            continue
        seen.add((name, *sorted(extras)))
        found.add(name)
        try:
            lines = requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # only another Python needs it
            continue
        for needed in map(Requirement, lines):
            versions = {"python_version": python, "python_full_version": f"{python}.0"}
            if needed.marker is None or any(needed.marker.evaluate(versions | {"extra": extra}) for extra in extras):
                queue.append(needed)
    return found


# ------------------------------------------------------------------------------------ pyproject, lock and conda agree


def test_the_lock_pins_every_line_exactly_and_all_but_pytorch_by_hash():
    assert all(re.fullmatch(r"==[0-9A-Za-z.]+", str(line.specifier)) for line in LOCKED)
    assert [line for line in LOCK_LINES if not re.search(r"( +--hash=sha256:[0-9a-f]{64})+$", line)] == [
        f"{name}=={LOCK[name]}" for name in ("torch", "torchvision")
    ]  # of which there are CPU and CUDA builds
    assert LOCK["torch"] == "2.13.0"
    assert [name for name in LOCK if name.startswith(("nvidia", "cuda", "triton"))] == []


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_the_lock_satisfies_pyproject(requirement):
    assert requirement.specifier, "a dependency without a lowest version"
    assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_holds_all_that_is_needed(python):
    missing = sorted(required(python) - lock(python).keys())
    assert missing == [], "write the lock anew: make lock"


def test_the_installed_environment_is_the_lock():
    if Path(sys.prefix).resolve() != ROOT / ".venv":
        pytest.skip("not the environment that make sets up (conda, for one, brings its own PyTorch)")
    needed = required(f"{sys.version_info.major}.{sys.version_info.minor}")
    installed = {name: Version(importlib.metadata.version(name)).public for name in needed}
    assert installed == {name: LOCK[name] for name in needed}


def test_conda_takes_all_but_python_and_pytorch_from_pyproject():
    conda = dict(entry.split("=") for entry in CONDA["dependencies"] if isinstance(entry, str) and "=" in entry)
    assert CONDA["channels"][0] == "conda-forge"
    assert conda.keys() == {"python", "pytorch-gpu"}
    assert SpecifierSet(PROJECT["requires-python"]).contains(conda["python"])
    torch = next(requirement for requirement in REQUIREMENTS if requirement.name == "torch")
    assert torch.specifier.contains(conda["pytorch-gpu"])
    assert [entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict)] == [["-e .[dev,deploy]"]]


def test_every_place_asks_for_the_same_oldest_python():
    oldest = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"]).groups()
    for path in ("Makefile", ".ci/run"):
        asked = re.findall(r"sys\.version_info < \((\d+), (\d+)\)", (ROOT / path).read_text())
        assert asked == [oldest], path
    assert f"python{'.'.join(oldest)} -m venv" in (ROOT / "Makefile").read_text()  # the lock is made on the oldest


# --------------------------------------------------------------------------------------------- licence and citation


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_bytes()
    assert PROJECT["license"] == "Apache-2.0"
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_the_citation_names_the_thesis():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    thesis = citation["preferred-citation"]
    assert thesis["type"] == "thesis" and thesis["year"] == 2024
    assert thesis["authors"] == [{"family-names": "Biswas", "given-names": "Risab"}]
    assert thesis["title"] == (
        "Multi-Task Multi-Scale Contrastive Knowledge Distillation for Efficient Medical Image Segmentation"
    )
    assert thesis["identifiers"][0]["value"] == "arXiv:2406.03173"


# ---------------------------------------------------------------------------------------------------------- notebooks


def test_every_experiment_has_its_notebook():
    assert {path.stem for path in NOTEBOOKS} >= set(BY_DEFAULT)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_holds_nothing_of_a_run(path):
    remedy = "run: make strip"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.keys() == {"kernelspec"} and notebook.metadata.kernelspec.name == "python3", remedy
    for cell in notebook.cells:
        assert cell.metadata.keys() <= {"tags"}, remedy
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, remedy
    assert len([cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]) == 1


def test_every_experiment_takes_what_a_study_gives(tmp_path):
    found = plan(parser().parse_args(["study", "--results", str(tmp_path)]))
    for name in found["experiments"]:
        wanted = {"results", "study"} if name in ("06_figures", "00_by_hand") else found["shared"].keys()
        assert wanted <= found["parameters"][name].keys()
    assert read_parameters(ROOT / "notebooks" / "report.ipynb").keys() == {"results", "study"}


# --------------------------------------------------------------------------------------------------------------- make

# stands in for Python: writes down what it is asked to do, "makes" environments by copying itself
PYTHON = """\
#!/bin/sh
[ "$1" = -c ] && exit "${UNUSABLE:-0}"
for word; do printf '<%s>' "$word"; done >> "$LOG"
echo >> "$LOG"
case "$2" in
    venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    pip) exit "${PIP_STATUS:-0}" ;;
esac
"""


class Project:
    """A copy of what make reads, with a Python that only writes down its calls."""

    def __init__(self, folder: Path):
        self.folder, self.python, self.log = folder / "a b", folder / "python", folder / "log"
        self.folder.mkdir()
        for name in ("Makefile", "pyproject.toml", "requirements.lock"):
            shutil.copy(ROOT / name, self.folder)
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def make(self, *words: str, **environment: str) -> tuple[int, list[str], str]:
        """Exit status, calls of Python since the last time, and stderr."""
        self.log.write_text("")
        environment |= {"PATH": os.environ["PATH"], "LOG": str(self.log)}  # nothing of a make that runs this test
        words = ("make", *words, f"PYTHON={self.python}")
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True)
        return done.returncode, self.log.read_text().splitlines(), done.stderr


@pytest.fixture
def project(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return Project(tmp_path)


def kinds(calls: list[str]) -> list[str]:
    return [re.match("<-m><([^>]*)>", call)[1] for call in calls]


def test_the_environment_is_made_once_and_from_the_lock(project):
    status, calls, _ = project.make("test")
    assert status == 0 and kinds(calls) == ["venv", "pip", "pip", "pytest"]
    assert calls[0] == "<-m><venv><.venv>"
    assert calls[1].endswith("<--require-hashes><--no-deps><-r><.venv/hashed>")
    assert calls[2].endswith("<--no-build-isolation><-c><.venv/versions><-e><.[dev,deploy]>")
    hashed, versions = ((project.folder / ".venv" / name).read_text() for name in ("hashed", "versions"))
    assert not re.search("^torch(vision)?==", hashed, re.MULTILINE) and hashed.count("--hash") > len(LOCKED)
    assert [str(Requirement(line)) for line in versions.splitlines()[1:]] == list(map(str, LOCKED))
    assert kinds(project.make("test")[1]) == ["pytest"]


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements.lock"])
def test_a_changed_dependency_updates_the_environment(project, name):
    project.make("test")
    later = (project.folder / ".venv" / ".complete").stat().st_mtime + 10
    os.utime(project.folder / name, (later, later))
    assert kinds(project.make("test")[1]) == ["pip", "pip", "pytest"]


def test_a_half_made_environment_is_made_again(project):
    status, calls, _ = project.make("test", PIP_STATUS="1")
    assert status != 0 and kinds(calls) == ["venv", "pip"]
    (project.folder / ".venv" / "left over").touch()
    assert kinds(project.make("test")[1]) == ["venv", "pip", "pip", "pytest"]
    assert not (project.folder / ".venv" / "left over").exists()


def test_a_moved_or_broken_environment_is_made_again(project):
    project.make("test")
    project.folder = project.folder.rename(project.folder.with_name("moved"))
    assert kinds(project.make("test")[1]) == ["venv", "pip", "pip", "pytest"]
    (project.folder / ".venv" / "bin" / "python").unlink()
    assert kinds(project.make("test")[1]) == ["venv", "pip", "pip", "pytest"]


def test_no_usable_python_is_one_line_that_says_what_to_install(project):
    status, calls, errors = project.make("test", UNUSABLE="1")
    assert status != 0 and calls == []
    (line,) = [line for line in errors.splitlines() if not line.startswith("make: ***")]
    assert "Python 3.11" in line and "python3-venv" in line and str(project.python) in line
    assert not (project.folder / ".venv").exists()


@pytest.mark.parametrize("nasty", [
    'it\'s "a" $HOME; touch one & `touch two` $(touch three) $(shell touch four) #5 é', "../../x", "-rf", "$$(touch x)",
    "${shell touch x}", "a\\", "%s%n", "x | touch x", "x > x", "$(eval x:=$(shell touch x))", "\u202egpj", "x" * 5000,
], ids=ascii)  # fmt: skip
def test_variables_reach_a_study_as_plain_text(project, nasty):
    names = (
        "data",
        "target",
        "profile",
        "protocol",
        "changes",
        "on-defect",
        "group",
        "folds",
        "seeds",
        "device",
        "results",
        "study",
    )
    _, calls, _ = project.make("study", *(f"{name.upper().replace('-', '_')}={nasty}" for name in names))
    assert calls[-1] == "<-m><kdlib><study>" + "".join(f"<--{name}={nasty}>" for name in names)
    _, calls, _ = project.make("study", DATA=nasty, LAB=nasty)  # from the environment
    assert f"<--data={nasty}>" in calls[-1]
    project.make("lab", f"LAB={nasty}")
    left = sorted(path.name for path in project.folder.iterdir())
    assert left == [".venv", "Makefile", "pyproject.toml", "requirements.lock"]


def test_the_defaults_of_make_are_those_of_the_command_line(project):
    _, calls, _ = project.make("study")
    command = re.findall("<([^>]*)>", calls[-1])[2:]
    assert parser().parse_args(command) == parser().parse_args(["study"])
    _, calls, _ = project.make("study", "DRY=1", "CORES=abc")
    assert calls[-1].startswith("<-m><kdlib><dry-run><--data=phantom>")


def test_lab_stays_on_this_machine_and_behind_its_token(project):
    _, calls, _ = project.make("lab", "LAB=--no-browser --port=8890")
    assert calls[-1] == "<-m><jupyterlab><--ip=127.0.0.1><--no-browser><--port=8890><notebooks/explore.ipynb>"


def test_clean_keeps_results_and_help_lists_every_variable(project):
    project.make("test")
    for name in ("results", "kdlib", "tests", "notebooks"):
        (project.folder / name).mkdir()
    (project.folder / "results" / "table.csv").touch()
    assert project.make("clean")[0] == 0
    assert (project.folder / "results" / "table.csv").exists() and not (project.folder / ".venv").exists()
    environment = {"PATH": os.environ["PATH"]}
    words = subprocess.check_output(["make", "help"], cwd=project.folder, env=environment, text=True).split()
    variables = re.search(r"^VARIABLES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(variables) <= set(words)


# ------------------------------------------------------------------------------------------------------------------ CI


def test_ci_only_runs_make_test(tmp_path):
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (tmp_path / "repo" / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / "repo" / ".ci")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("make", "git", "python3.13", "apt-get", "chromium", "slurmctld", "munged"):
        (tools / name).write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo "$PWD {name} $*" >> "{tmp_path}/log"\n')
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin"}
    subprocess.run([tmp_path / "repo" / ".ci" / "run"], env=environment, check=True, capture_output=True)
    assert (tmp_path / "log").read_text() == f"{tmp_path}/repo make test\n"


def test_ci_goes_on_where_a_browser_and_slurm_cannot_be_installed(tmp_path):
    folder, tools = tmp_path / "repo" / ".ci", tmp_path / "tools"
    folder.mkdir(parents=True)
    tools.mkdir()
    script = (ROOT / ".ci" / "run").read_text()
    (folder / "run").write_text(script.replace(":/usr/sbin:/sbin", ""))
    for name in ("bash", "dirname", "mktemp", "tee", "grep", "rm"):
        (tools / name).symlink_to(shutil.which(name))
    stubs = {"make": "echo made $*", "git": "", "python3.13": "", "id": "echo 0", "apt-get": "exit 100"}
    for name, does in stubs.items():
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
    for path in (folder / "run", *(tools / name for name in stubs)):
        path.chmod(0o755)
    done = subprocess.run([folder / "run"], env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("+ make test\nmade test\n"), done.stderr
    assert "warning: chromium slurm-wlm munge could not be installed" in done.stderr


@pytest.mark.parametrize("reason, status", [("needs a CUDA device", 0), ("no Chromium: x", 1), ("no reason", 1)])
def test_ci_fails_on_a_skip_that_it_does_not_know(tmp_path, reason, status):
    (tmp_path / "repo" / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / "repo" / ".ci")
    tools = tmp_path / "tools"
    tools.mkdir()
    stubs = dict.fromkeys(("git", "python3.13", "chromium", "slurmctld", "munged"), "")
    for name, does in (stubs | {"make": f"echo 'SKIPPED [1] tests/test_x.py:1: {reason}'"}).items():
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin"}
    done = subprocess.run([tmp_path / "repo" / ".ci" / "run"], env=environment, capture_output=True, text=True)
    assert done.returncode == status
    assert ("for a reason that CI does not know" in done.stderr) == bool(status)


@pytest.mark.parametrize("path", ["Makefile", ".ci/run", "requirements.lock", "environment.yml", "pyproject.toml"])
def test_no_network_address_is_written_down(path):
    assert "://" not in (ROOT / path).read_text()


def test_no_scan_no_weights_and_no_picture_of_real_pixels_is_committed():
    names = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout.splitlines()
    if not names:
        pytest.skip("not a git checkout")
    scans = [name for name in names if re.search(r"\.(nii|nii\.gz|mgz|dcm|npz|npy|h5|pt|pth|ckpt|safetensors)$", name)]
    pictures = [
        name for name in names
        if re.search(r"(slices|qualitative|pairs|overview)\.(png|pdf|svg)$", name)
        and not re.match(r"(results|docs/site)/(phantom-|hippocampus/)", name)  # CC-BY-SA, named in the caption
    ]  # fmt: skip
    released = {f"results/students/hippocampus-{name}/model.safetensors" for name in ("s1", "s2", "e1")}  # CC-BY-SA
    assert set(scans) <= released and pictures == []
