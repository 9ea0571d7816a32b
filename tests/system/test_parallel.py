"""Several processes for one training: the weights of one, each case once, one clear end.

As a script under torchrun (see `pair`), this file is a rank of the group that the tests look at.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from kdlib.config import (
    PROFILES,
    PROTOCOLS,
    InputError,
    Preprocessing,
    Profile,
    Recipe,
    Run,
    Term,
    from_json,
    override_profile,
    to_json,
)
from kdlib.data import SliceBank, make_phantom
from kdlib.experiments import parallel
from kdlib.experiments.parallel import launch, main
from kdlib.experiments.recipes import controls, distiller, thesis_recipe
from kdlib.experiments.runner import study
from kdlib.experiments.store import manifest, run_folder
from kdlib.training import ranks
from kdlib.training.checkpoint import InterruptHandler
from kdlib.training.loop import new_model, train_cohort

CPU, STEPS = torch.device("cpu"), 20
TINY = Profile("tiny", Preprocessing(32, 12.0), 0.125, 1, 12, 2, 4, folds=3)
PAIR = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


class DoubleBank(SliceBank):
    """Batches in double precision."""

    def batch(self, index):
        images, labels = super().batch(index)
        return images.double(), labels


def bank(cases: int, seed: int) -> DoubleBank:
    """Cases of four slices with a bright square."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 80, (4 * cases, 16, 16), generator=draw, dtype=torch.uint8)
    labels = torch.zeros_like(images)
    for mask in labels:
        top, left = torch.randint(1, 9, (2,), generator=draw).tolist()
        mask[top : top + 6, left : left + 6] = 1
    images[labels > 0] += 120
    index = torch.arange(len(images))
    names = tuple(f"c{i}" for i in range(cases))
    return DoubleBank(
        images,
        labels,
        index // 4,
        torch.stack([index, index], 1),
        names,
        ("spleen",),
        "repeat",
        {},
        tuple(range(cases)),
    )


def cohorts() -> list[list[Run]]:
    """A teacher with its reconstruction; the thesis's recipe and a distiller of each family, balanced; the published
    protocol with a shuffled teacher."""
    teacher = Run("phantom", "spleen", "T1", profile=dataclasses.replace(TINY, preprocessing=Preprocessing(16)))
    families = (
        Term("dist", "dist", 1.0, student_layers="logits"),
        Term("reviewkd", "reviewkd", 1.0, student_layers=("encoder2", "bottleneck")),
        Term("sp", "sp", 1.0, student_layers="encoder2"),
        Term("crd", "crd", 1.0, student_layers="bottleneck"),
    )
    published = dataclasses.replace(thesis_recipe("S1", only=("B-B", "PMD")), name="published", teacher="shuffled")
    recipes = [thesis_recipe("S1"), Recipe("families", terms=families, balance=0.5), published]
    students = [dataclasses.replace(teacher, model="S1", teacher="T1", recipe=recipe) for recipe in recipes]
    return [[teacher], students[:2], [dataclasses.replace(students[2], protocol=PROTOCOLS["thesis"])]]


def trained() -> dict[str, tuple[dict[str, torch.Tensor], list[dict]]]:
    """Recipe -> everything that `STEPS` steps leave: weights, statistics, projectors, memories; and the history.

    In double precision. In single precision AdamW and RMSprop make steps of the learning rate out of any gradient that
    is nothing but rounding, as those of biases before a batch norm are, and 20 such steps of one process are repeated
    by no other order of a sum.
    """
    torch.set_default_dtype(torch.float64)
    try:
        found = {}
        for runs in cohorts():
            teachers = {}
            if runs[0].teacher:
                teachers = {"T1": new_model(cohorts()[0][0], 1).eval().requires_grad_(False)}
            for arm in train_cohort(runs, bank(5, 0), bank(3, 1), STEPS, CPU, teachers, 1):
                assert arm.failure is None, arm.failure
                state = dict(arm.model.state_dict())
                state |= {f"distiller.{k}": v for k, v in (arm.distiller or nn.Module()).state_dict().items()}
                state = {key: value.contiguous() for key, value in state.items()}
                found[arm.run.recipe.name] = state, arm.history
        return found
    finally:
        torch.set_default_dtype(torch.float32)


def gathered() -> dict[str, object]:
    """What the functions of `kdlib.training.ranks` give this rank."""
    whole = torch.arange(48.0, dtype=torch.float64).view(4, 3, 2, 2).sin()
    part = ranks.share(whole).clone().requires_grad_()
    weight = torch.arange(48.0, dtype=torch.float64).view(4, 3, 2, 2)
    back = ranks.gather(part)
    (back * weight).sum().backward()
    with ranks.one_after_another():
        pass
    with pytest.raises(SystemExit) as ended, InterruptHandler() as stops:
        stops.agree()
        with stops.deferred():
            if ranks.rank():
                os.kill(os.getpid(), signal.SIGTERM)
        stops.agree()
    return {
        "ended": ended.value.code,
        "gathered": torch.equal(back.detach(), whole),
        "half": ranks.gather(part.detach().bfloat16()).equal(whole.bfloat16()),
        "gradient": torch.equal(part.grad, ranks.share(weight) * ranks.size()),
        "mean": ranks.mean(torch.tensor([float(ranks.rank())])).item(),
        "total": ranks.total(torch.tensor([ranks.rank() + 1])).item(),
        "highest": ranks.highest(5 * ranks.rank()),
        "agreed": ranks.agree({"of": ranks.rank()}),
        "dealt": {str(n): list(ranks.deal(range(n))) for n in (0, 1, 5)},
        "collected": {str(n): ranks.collect([f"case {i}" for i in ranks.deal(range(n))]) for n in (0, 1, 5)},
    }


def rank_of_a_pair(folder: Path) -> None:
    with ranks.joined("cpu"):
        found = trained()
        tensors = {f"{name}/{key}": value for name, (state, _) in found.items() for key, value in state.items()}
        safetensors.torch.save_file(tensors, folder / f"{ranks.rank()}.safetensors")
        record = gathered() | {"history": {name: history for name, (_, history) in found.items()}}
        (folder / f"{ranks.rank()}.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two gloo processes found, each: tensors by name, and the rest."""
    folder = tmp_path_factory.mktemp("pair")
    quiet = os.environ | {"KDLIB_PROGRESS": "plain", "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    done = subprocess.run([*PAIR, __file__, str(folder)], capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    return [
        (safetensors.torch.load_file(folder / f"{i}.safetensors"), json.loads((folder / f"{i}.json").read_text()))
        for i in range(2)
    ]


def test_two_processes_give_the_weights_of_one_to_1e_7_after_20_steps(pair):
    """Weights, running statistics, projectors, memories, and every logged number, measured gradients among them."""
    alone = trained()
    for tensors, record in pair:
        assert {key.partition("/")[0] for key in tensors} == set(alone) == set(record["history"])
        for name, (state, history) in alone.items():
            theirs = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
            assert theirs.keys() == state.keys(), "no prefix of a wrapper"
            for key, value in state.items():
                torch.testing.assert_close(theirs[key], value, atol=1e-7, rtol=0, msg=f"{name}: {key}")
            assert [row["name"] for row in record["history"][name]] == [row["name"] for row in history]
            for row, other in zip(history, record["history"][name], strict=True):
                assert other["value"] == pytest.approx(row["value"], rel=1e-6, abs=1e-9), (name, row["name"])
    assert any(key.endswith("bank.vectors") and value.any() for key, value in pair[0][0].items()), "a memory was filled"


def test_the_ranks_are_alike_to_the_bit(pair):
    (first, _), (second, _) = pair
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_ranks_share_gather_and_agree(pair):
    for number, (_, record) in enumerate(pair):
        assert record["gathered"] and record["half"] and record["gradient"]
        assert (record["mean"], record["total"], record["highest"]) == (0.5, 3, 5)
        assert record["agreed"] == {"of": 0}
        assert record["ended"] == 143, "both, of a signal to one"
        assert record["dealt"] == {"0": [], "1": [0] if number == 0 else [], "5": [0, 2, 4] if number == 0 else [1, 3]}
        assert record["collected"] == {str(n): [f"case {i}" for i in range(n)] for n in (0, 1, 5)}


def test_one_process_alone_changes_nothing():
    maps, module = torch.randn(4, 3, 2, 2), nn.BatchNorm2d(3)
    assert ranks.share(maps).equal(maps) and ranks.gather(maps) is maps and ranks.gather(None) is None
    assert ranks.wrap(module) is module and ranks.norms_of_whole_batches(module, CPU) is module
    assert ranks.deal([1, 2]) == [1, 2] == ranks.collect([1, 2]) and ranks.agree("x") == "x" and ranks.highest(3) == 3


def test_batch_norm_of_one_rank_equals_torchs(monkeypatch):
    """Values, gradients and running statistics; that of several ranks is seen in the weights above."""
    monkeypatch.setattr(ranks, "total", lambda values: values)
    images = torch.randn(6, 4, 5, 5, dtype=torch.float64) * 3 + 7
    theirs, ours = nn.BatchNorm2d(4).double(), ranks.WholeBatchNorm(4).double()
    found = []
    for norm in (theirs, ours):
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5, -1.0]))
        x = images.clone().requires_grad_()
        out = norm(x)
        (out**3).sum().backward()
        found.append([out.detach(), x.grad, norm.weight.grad, norm.bias.grad, *norm.state_dict().values()])
        found[-1].append(norm.eval()(images).detach())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------------------------------- from end to end


def taught(data: str = "phantom") -> Run:
    recipe = thesis_recipe("S1", only=("D-D", "PMD"))
    return Run(data, "spleen", "S1", fraction=0.5, teacher="T1", profile=TINY, recipe=recipe)


def started(file: Path, results: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-u",
        "-m",
        "kdlib.experiments.parallel",
        str(file),
        "--results",
        str(results),
        "--device",
        "cpu",
    ]
    quiet = os.environ | {"KDLIB_PROGRESS": "plain", "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet)


def until(child: subprocess.Popen, pattern: str) -> None:
    said = []
    for line in child.stdout:
        said.append(line)
        if re.search(pattern, line):
            return
    pytest.fail(f"never said {pattern}: {''.join(said)} {child.stderr.from_json()}")


def rank_of(parent: int, number: int) -> psutil.Process:
    """The process of a rank, among the children of who started it."""
    return next(c for c in psutil.Process(parent).children() if c.environ().get("RANK") == str(number))


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_say_so_in_one_line_and_go_on_to_the_end_of_one(tmp_path, monkeypatch):
    run, results = taught(str(make_phantom(tmp_path / "data", patients=9))), tmp_path / "pair"
    folder, file = run_folder(run, results), tmp_path / "run.json"
    file.write_text(json.dumps(to_json(run)))

    child = started(file, results)
    until(child, r"KD\(T1, S1\).*epoch 2/12")
    rank_of(child.pid, 1).kill()
    _, errors = child.communicate()
    assert child.returncode == 1
    assert errors == "error: process 1 of 2 was killed by SIGKILL, and the others were ended; finished runs are kept\n"
    # whether rank 0 has the time to write down why depends on who sees the death first
    assert json.loads((folder / "manifest.json").read_text())["status"] in ("training", "failed")

    monkeypatch.setenv("KDLIB_PROCESSES", "2")
    found = study([run], results, "cpu")
    record = manifest(run, results)
    assert record["processes"] == 2 and record["steps"] == 48
    assert len(record["sessions"]) == 2 and record["sessions"][1]["from_step"] >= 8
    assert {session["processes"] for session in record["sessions"]} == {2}
    names = {path.name for path in folder.iterdir()}
    assert not any(re.match(r"\.\w{12}\.", name) for name in names) and "checkpoint.safetensors" not in names
    monkeypatch.setattr(parallel, "launch", lambda *_: pytest.fail("trained again"))
    monkeypatch.delenv("KDLIB_PROCESSES")
    alone = study([run], tmp_path / "alone", "cpu")
    keys = ["case", "class", "metric"]
    assert found.cases[keys].equals(alone.cases[keys]) and not found.cases.duplicated(keys).any()
    assert found.cases["case"].nunique() == 3, "more for one rank than for the other"
    dice = [table.cases.query("metric == 'dice'")["value"].mean() for table in (found, alone)]
    assert dice[0] == pytest.approx(dice[1], abs=0.1)
    first = [table.history.query("epoch == 1").set_index("name")["value"] for table in (found, alone)]
    pd.testing.assert_series_equal(*first, rtol=1e-2, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_run_survives_its_description():
    view = dict(profile=override_profile("hippocampus", {"window": (-100.0, 200.0)}), data="folder", target="all")
    contrast = Term("B-B", "supcon", 0.1, 0.4, options={"hard": 0.5}, student_layers="bottleneck", projector="frozen")
    runs = [*controls("S1", "T1", **view), Run(model="T2", protocol=PROTOCOLS["thesis"], **view)]
    runs.append(Run(model="S2", teacher="T1+T2", recipe=Recipe("own", terms=(contrast,), balance=0.5), **view))
    runs.append(Run(model="S1", teacher="T1", recipe=distiller("cirkd", "S1"), **view))
    assert [from_json(json.loads(json.dumps(to_json(run)))) for run in runs] == runs
    short = {"data": "phantom", "target": "spleen", "model": "S1", "profile": "ct128", "protocol": "thesis"}
    assert from_json(short) == Run("phantom", "spleen", "S1", profile=PROFILES["ct128"], protocol=PROTOCOLS["thesis"])


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "give a run"),
        ('["S1"]', "give a run"),
        ('{"data": "phantom", "target": "spleen"}', "missing .* 'model'"),
        ('{"data": "phantom", "target": "spleen", "model": "S1", "folds": 0}', "field of a Run 'folds'"),
        ('{"data": "phantom", "target": "spleen", "model": "S1", "profile": "fast"}', "choose from quick"),
        ('{"data": "phantom", "target": "spleen", "model": "S1", "profile": {"preprocessing": 3}}', "is no run"),
        ('{"data": "phantom", "target": "spleen", "model": "S9"}', "model 'S9' does not exist"),
        ('{"data": "phantom", "target": "spleen", "model": "S1", "fold": "a"}', "is no run"),
        ('{"data": "phantom", "target": "spleen", "model": "S1", "recipe": ["PMD"]}', "is no run"),
    ],
)
def test_a_bad_description_is_one_line(text, message, tmp_path, capsys):
    file = tmp_path / "runs.json"
    if text is not None:
        file.write_text(text)
    assert main([str(file), "--results", str(tmp_path / "results")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and re.search(message, errors)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "processes, message",
    [
        (3, "a batch of 16 images cannot be divided by 3 processes: take 2, 4, 8, 16 processes"),
        (0, "0 processes: give at least 1"),
    ],
)
def test_processes_that_cannot_be_are_refused_before_any_is_started(processes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        launch([taught()], tmp_path / "results", processes, "cpu")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("text", ["two", "0", "-2", ""])
def test_a_wrong_number_of_processes_in_the_environment_is_refused(text, monkeypatch):
    monkeypatch.setenv("KDLIB_PROCESSES", text)
    with pytest.raises(InputError, match="give the number of processes"):
        ranks.asked()


LOST = {"message": "RuntimeError: Connection closed by peer", "extraInfo": {"py_callstack": "...", "timestamp": "5"}}
TOLD = {"message": "InputError: the disk is full", "extraInfo": {"py_callstack": "...", "timestamp": "6"}}
ENDED = "and the others were ended; finished runs are kept"


@pytest.mark.parametrize(
    "failures, expected",
    [
        ([(1, LOST), (-9, None)], ("", f"process 1 of 2 was killed by SIGKILL, {ENDED}")),
        ([(1, LOST), (1, TOLD)], ("InputError", "the disk is full")),
        (
            [(1, LOST)],
            ("RuntimeError", f"process 0 of 2 failed with RuntimeError (Connection closed by peer), {ENDED}"),
        ),
        ([(7, None)], ("", f"process 0 of 2 ended with exit status 7, {ENDED}")),
    ],
)
def test_of_several_failures_the_first_cause_is_told(failures, expected, tmp_path):
    found = {}
    for rank, (code, message) in enumerate(failures):
        file = tmp_path / f"{rank}.json"
        if message:
            file.write_text(json.dumps({"message": message}))
        found[rank] = ProcessFailure(rank, 1000 + rank, code, str(file))
    assert parallel._cause(found, 2) == expected


def test_a_rank_is_started_by_torchrun():
    with pytest.raises(InputError, match="start it by torchrun"), ranks.joined("cpu"):
        pass


if __name__ == "__main__":
    rank_of_a_pair(Path(sys.argv[1]))
