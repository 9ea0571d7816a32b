"""What comes from a data folder, a results folder or a command line is data: never code, never a path or a command."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from nbformat import v4

from kdlib.analysis.statistics import to_latex
from kdlib.apps.cli import main, parser
from kdlib.apps.notebooks import check_parameters, execute, read_notebook
from kdlib.apps.study import study_parameters
from kdlib.config import InputError
from kdlib.data import build_bank, index, split_file, splits
from kdlib.data.decathlon import Dataset
from kdlib.experiments.setting import Setting
from kdlib.experiments.tables import Results
from kdlib.files import check_study, read_arrays
from kdlib.training.checkpoint import load_weights

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "../../x", "/etc/x", "..", ".", "a/../../x", "a;touch x", "$(touch x)", "`touch x`", "a\ntouch x", "a\0b", "-rf",
    "--help", "x" * 300, "\u202egpj.exe", "a b", "a|b", "a&b", "a>b", "*", "~root", "C:\\x", "CON:", "", " ", "é",
    "${HOME}", "{x}", "%s", "'", '"', "\\", "a\r", "\ud800",
)  # fmt: skip


# ------------------------------------------------------------------------------------------- what the code never does

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
         "tempfile.mktemp", "pd.read_pickle", "pandas.read_pickle", "torch.hub.load", "torch.jit.load",
         "subprocess.getoutput", "subprocess.getstatusoutput"}  # fmt: skip


def dangers(source: str) -> list[str]:
    """Calls and imports that turn data into code or commands, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [(node.lineno, name) for name in names if name.split(".")[0] in UNPICKLERS]
            if getattr(node, "module", None) == "os":  # from os import system
                found += [(node.lineno, name) for name in names if f"os.{name}" in CALLS]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if name in CALLS:
            found.append((node.lineno, name))
        if name == "torch.load" and given.get("weights_only") is not True:
            found.append((node.lineno, "torch.load without weights_only=True"))
        if name in ("np.load", "numpy.load") and given.get("allow_pickle") is not False:
            found.append((node.lineno, "np.load without allow_pickle=False"))
        if given.get("shell", False) is not False:
            found.append((node.lineno, "shell=True"))
        if given.get("verify", True) is not True:
            found.append((node.lineno, "a certificate that nobody checks"))
        if name.endswith(".extractall") and given.get("filter") != "data":
            found.append((node.lineno, "extractall without filter='data'"))
    return [f"line {line}: {what}" for line, what in found]


def code_of(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


SOURCES = sorted(
    path for pattern in ("kdlib/**/*.py", "benchmarks/*.py", "notebooks/*.ipynb") for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_turns_data_into_code_or_commands(path):
    assert dangers(code_of(path)) == []


@pytest.mark.parametrize("line", [
    "import pickle", "from joblib import load", "import dill as d", "torch.load(path)",
    "torch.load(p, weights_only=False)", "np.load(p)", "np.load(p, allow_pickle=True)", "eval(text)", "exec(text)",
    "os.system(c)", "from os import system", "subprocess.run(c, shell=True)", "subprocess.Popen(c, shell=flag)",
    "yaml.load(text)", "pd.read_pickle(p)",
    "tar.extractall(p)", "requests.get(u, verify=False)", "def f():\n    os.popen(c)",
])  # fmt: skip
def test_the_search_finds_each_of_them(line):
    assert len(dangers(line)) == 1


@pytest.mark.parametrize("line", [
    "model.eval()", "torch.load(p, weights_only=True)", "np.load(p, allow_pickle=False)",
    "subprocess.run([a, b], shell=False)", "re.compile(x)", "yaml.safe_load(t)", "tar.extractall(p, filter='data')",
])  # fmt: skip
def test_the_search_lets_the_safe_forms_be(line):
    assert dangers(line) == []


# ------------------------------------------------------------------------------------------------------------ pickles


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    """A folder that only an unpickled bomb makes."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.is_dir(), "the bomb is a dud"
    path.rmdir()
    yield path
    assert not path.exists(), "a pickle was loaded"


def bombs(canary: Path, folder: Path) -> dict[str, bytes]:
    """The same pickle bare, as PyTorch saves it (zip and old form), and as an object array, alone and in an archive."""
    files = {}
    for name, save in {
        "bare": lambda path: path.write_bytes(pickle.dumps(Bomb(canary))),
        "torch": lambda path: torch.save({"weight": Bomb(canary)}, path),
        "old torch": lambda path: torch.save(Bomb(canary), path, _use_new_zipfile_serialization=False),
        "npy": lambda path: np.save(path, np.array([Bomb(canary)], object), allow_pickle=True),
        "npz": lambda path: np.savez(path, image=np.array([Bomb(canary)], object), allow_pickle=True),
    }.items():
        path = folder / f"bomb.{name if name in ('npy', 'npz') else 'bin'}"
        save(path)
        files[name] = path.read_bytes()
        path.unlink()
    return files


KINDS = ("bare", "torch", "old torch", "npy", "npz")


@pytest.mark.parametrize("kind", KINDS)
def test_no_pickle_in_a_results_folder_is_loaded(canary, tmp_path, kind):
    blob = bombs(canary, tmp_path)[kind]
    for name in ("best.safetensors", "slices.npz", "x.ipynb", "slices/01.npz", "tables/01_cases.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(blob)
    with pytest.raises(InputError, match="best.safetensors cannot be read"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "best.safetensors")
    with pytest.raises(InputError, match="slices.npz holds no plain arrays"):
        read_arrays(tmp_path / "slices.npz")
    with pytest.raises(InputError, match="x.ipynb is not a readable notebook"):
        read_notebook(tmp_path / "x.ipynb")
    for part in ("cases", "history", "runs"):
        (tmp_path / f"tables/01_{part}.csv").write_bytes(blob)
    with pytest.raises(ValueError):
        Results.load(tmp_path, "01")
    for part in ("cases", "history", "runs"):
        (tmp_path / f"tables/01_{part}.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="01.npz holds no plain arrays"):
        Results.load(tmp_path, "01")


@pytest.mark.parametrize("kind", KINDS)
def test_no_pickle_in_a_data_folder_is_loaded(canary, tmp_path, data_copy, kind):
    blob = bombs(canary, tmp_path)[kind]
    folder = data_copy
    for part in ("imagesTr", "labelsTr"):
        (folder / part / "phantom_000.nii.gz").write_bytes(blob)
        (folder / part / "phantom_000.npz").write_bytes(blob)
    with pytest.raises(InputError, match="2 defects in 1 of 2 cases"):
        index(folder)
    dataset = index(folder, on_defect="drop")
    record = tmp_path / "split.json"
    record.write_bytes(blob)
    with pytest.raises(InputError, match="not a whole record of a split"):
        splits(dataset, {"spleen": 1}, 2, record)
    shutil.copy(folder / "imagesTr/phantom_000.nii.gz", dataset.cases[0].image)
    with pytest.raises(InputError, match="cannot be read any more"):
        build_bank(dataset, {"spleen": 1}, study_view())
    (folder / "dataset.json").write_bytes(blob)
    with pytest.raises(InputError, match="malformed"):
        index(folder)


def study_view():
    from kdlib.config import PROFILES

    return PROFILES["quick"].preprocessing


@pytest.fixture
def data_copy(tmp_path, phantom_of) -> Path:
    """A phantom of two patients, to be changed."""
    return shutil.copytree(phantom_of(2), tmp_path / "copy")


# -------------------------------------------------------------------------------------------------------------- names


def named(*words: str) -> dict[str, object]:
    """The parameters of a study with these words on its command line."""
    return study_parameters(parser().parse_args(["study", *words]))[0]


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", [name for name in NAMES if name], ids=ascii)
def test_a_study_name_is_a_folder_in_results_or_refused(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "here" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    notebook = tmp_path / "notebooks" / "00_data.ipynb"
    notebook.parent.mkdir()
    cell = v4.new_code_cell('study: str = "x"  # y', metadata={"tags": ["parameters"]})
    nbformat.write(v4.new_notebook(cells=[cell]), notebook)
    before = files_of(tmp_path)
    folders = ["--results=results", f"--notebooks={notebook.parent}", "--only=00_data"]
    assert main(["study", f"--study={name}", *folders]) == 2
    assert main(["run", str(notebook), "-p", "study", name, "-o", str(tmp_path / "out.ipynb")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in errors) and len(errors) == 2
    assert all(line.isprintable() for line in errors)
    assert files_of(tmp_path) == before


def test_a_job_lies_in_the_folder_of_its_study():
    path = ROOT / "notebooks" / "00_data.ipynb"
    shared = {"data": "phantom", "target": "spleen", "profile": "quick", "results": "results"}
    for name in ("x/jobs/teacher-T1-fold0", "x"):
        assert check_parameters(path, shared | {"study": name})["study"] == name
    for name in ("x/../../y", "/x", "x//y", "x/", "x/./y", "x/.hidden", "x/a b", "runs/x"):
        with pytest.raises(InputError, match="study name"):
            check_parameters(path, shared | {"study": name})
        with pytest.raises(InputError, match="study name"):
            Setting(study=name)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=30), st.sampled_from(NAMES))
def test_a_study_named_after_its_data_is_a_folder_in_results(text, name):
    for target in (text, name, text + name):
        try:
            study = str(named(f"--target={target}")["study"])
        except InputError as error:
            assert str(error).startswith(("study name", "target"))
            continue
        check_study(study)
        assert Path("results", study).parent == Path("results") and shlex.quote(study) == study


def test_a_folder_that_a_shell_would_take_amiss_is_a_folder(tmp_path):
    for name in NAMES:
        if name and name.isprintable() and "/" not in name and len(name) < 200:
            folder = tmp_path / "data" / name
            folder.mkdir(parents=True, exist_ok=True)
            found = named(f"--data={folder}", f"--results={tmp_path / name}")
            assert Path(str(found["data"])) == folder.resolve() and re.fullmatch("[a-z0-9-]+", str(found["study"]))


@pytest.mark.parametrize(
    "option", ["--data", "--results", "--notebooks", "--target", "--only", "--device", "--changes"]
)
def test_no_value_of_the_command_line_ends_in_a_stack_trace(tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(tmp_path)
    for name in ("a\0b", "../../x", "x" * 5000, "\ud800"):
        command = ["study", "--only=00_data", f"--notebooks={tmp_path / 'none'}", "--results=results"]
        command = [word for word in command if not word.startswith(option)] + [option, name]
        assert main(command) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and errors[0].startswith("error: ")
    assert files_of(tmp_path) == []


def test_a_parameter_reaches_a_notebook_as_the_text_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [name for name in NAMES if name != "\ud800"] + [
        '"""', "'''", '"; __import__("os").mkdir("pwned"); "', '\\"; import os; os.mkdir("pwned") #', "\\", "\\n",
        "{text}", "\u2028import os", "!mkdir pwned", "%cd /", "\x1b]0;x\x07",
    ]  # fmt: skip
    cells = [
        v4.new_code_cell("texts: list[str] = []\ntable: dict = {}\nout: str = ''", metadata={"tags": ["parameters"]}),
        v4.new_code_cell("import json\njson.dump([texts, table], open(out, 'w'))"),
    ]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "echo.ipynb")
    table = {text: text for text in texts}
    values = {"texts": texts, "table": table, "out": str(tmp_path / "out.json")}
    execute(tmp_path / "echo.ipynb", tmp_path / "echo.out.ipynb", values)
    assert json.loads((tmp_path / "out.json").read_text()) == [texts, table]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_data_set_and_its_labels_cannot_name_a_file_outside_splits(tmp_path, data_copy, name):
    folder = data_copy
    about = json.loads((folder / "dataset.json").read_text())
    about |= {"name": name, "labels": about["labels"] | {"1": name}}
    (folder / "dataset.json").write_text(json.dumps(about))
    try:
        dataset = index(folder)
    except InputError as error:
        assert "dataset.json: malformed" in str(error) and str(error).isprintable()
        assert not name.isprintable() or not name.strip() or len(name) > 200
        return
    before = files_of(tmp_path)
    path = split_file(tmp_path / "splits", dataset, dataset.classes(name), 3)
    path.parent.mkdir()
    path.touch()
    assert path.resolve().parent == (tmp_path / "splits").resolve()
    assert files_of(tmp_path) == sorted([*before, "splits", f"splits/{path.name}"])


def test_a_hundred_labels_still_name_a_file(tmp_path):
    labels = {f"a label with a long name, number {value}": value for value in range(1, 105)}
    paths = {
        split_file(tmp_path, Dataset("Total", tmp_path, "CT", labels, (), pd.DataFrame()), classes, folds)
        for classes in (labels, dict(list(labels.items())[:-1])) for folds in (3, 4)
    }  # fmt: skip
    for path in paths:
        path.touch()
    assert len(paths) == 4


def test_a_label_name_cannot_command_tex(tmp_path):
    table = pd.DataFrame(
        {"class": ["\\input{/etc/passwd}", "\\write18{touch x}", "a & b % c"], "Dice": [0.1, 0.2, 0.3]}
    )
    text = to_latex(table, tmp_path / "table.tex", "A caption", "tab:x").read_text()
    assert "\\input" not in text and "\\write18" not in text and text.count("\\textbackslash") == 2


# --------------------------------------------------------------------------------------------------------- JupyterLab


def answers(port: int) -> bool:
    """Whether a server listens there."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def lab(tmp_path):
    """JupyterLab as `make lab` starts it, in an environment that is said to be whole: its address and its token."""
    if shutil.which("make") is None or sys.platform != "linux":
        pytest.skip("needs make and Linux")
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "explore.ipynb", tmp_path / "notebooks")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / ".complete").write_text(f"{tmp_path.resolve()}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = "--allow-root" if os.geteuid() == 0 else ""
    homes = {
        name: str(tmp_path / name) for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    environment = {"PATH": os.environ["PATH"], "JUPYTER_NO_CONFIG": ""} | homes
    words = ["make", "lab", f"LAB=--no-browser {root} --port={port} --ServerApp.port_retries=0"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 100
        while not ((token := re.search(r"token=([0-9a-f]{20,})", (tmp_path / "log").read_text())) and answers(port)):
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield port, token[1]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_jupyterlab_listens_on_this_machine_alone_and_asks_for_its_token(lab):
    port, token = lab

    def ask(path: str, **headers: str) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.url
        except urllib.error.HTTPError as error:
            return error.code, error.url

    assert ask("/api/contents")[0] == ask("/api/kernels")[0] == 403
    assert ask("/api/contents", Authorization="token 0123456789abcdef")[0] == 403
    assert "/login" in ask("/lab")[1]
    assert ask("/api/contents", Authorization=f"token {token}")[0] == 200
    for other in ("127.0.0.2", "::1"):  # a server of all addresses would take both
        with pytest.raises(OSError):
            socket.create_connection((other, port), timeout=30)


def test_a_zip_among_the_arrays_cannot_write_a_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("../../escaped.npy", b"\x93NUMPY")
    with pytest.raises(InputError, match="holds no plain arrays"):
        read_arrays(tmp_path / "x.npz")
    assert files_of(tmp_path) == ["x.npz"]
