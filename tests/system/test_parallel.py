"""Several processes for one training: the weights of one, each case once, one clear end.

The children of `launch` import this module by its name, for the functions that they are to call.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import psutil
import pytest
import safetensors.torch
import torch
from small_training import blobs
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from kdlib.apps.cli import main
from kdlib.config import (
    PROFILES,
    PROTOCOLS,
    InputError,
    Preprocessing,
    Profile,
    Recipe,
    Run,
    Term,
    TrainingError,
    from_json,
    to_json,
)
from kdlib.data import SliceBank
from kdlib.experiments import parallel
from kdlib.experiments.recipes import thesis_recipe
from kdlib.experiments.runner import study
from kdlib.experiments.store import manifest, run_folder
from kdlib.metrics import METRICS
from kdlib.models import MODELS, build_model
from kdlib.training.fabric import ALONE, Processes, launch
from kdlib.training.loop import train_cohort
from kdlib.training.state import new_model

CPU, STEPS = torch.device("cpu"), 20
TINY = Profile("tiny", Preprocessing(32, 12.0), 0.125, 1, 8, 2, 4, folds=3)


def without_batch_norm(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """S1 with norms of single images in place of batch norms, which on CPUs see the images of their process alone."""
    model = build_model("S1", spatial_dims, in_channels, out_channels)
    for parent in [*model.modules()]:
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(1, norm.num_features))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return model


class DoubleBank(SliceBank):
    """Batches in double precision."""

    def batch(self, index):
        images, labels = super().batch(index)
        return images.double(), labels


def doubled(bank: SliceBank) -> DoubleBank:
    return DoubleBank(**{field.name: getattr(bank, field.name) for field in dataclasses.fields(bank)})


def cohort() -> list[Run]:
    """A baseline apart; the thesis's recipe and a loss of each family, balanced, with memories."""
    student = Run("phantom", "spleen", "S1-images", fraction=0.5, profile=TINY)
    families = (
        Term("dist", "dist", 1.0, student_layers="logits"),
        Term("reviewkd", "reviewkd", 1.0, student_layers=("encoder2", "bottleneck")),
        Term("sp", "sp", 1.0, student_layers="encoder2"),
        Term("crd", "crd", 1.0, student_layers="bottleneck"),
    )
    recipes = [thesis_recipe("S1"), Recipe("families", terms=families, balance=0.5)]
    return [dataclasses.replace(student, teacher="T1", recipe=recipe) for recipe in recipes]


@mock.patch.dict(MODELS, {"S1-images": without_batch_norm})
def trained(processes: Processes = ALONE) -> dict[str, tuple[dict[str, torch.Tensor], list[dict]]]:
    """Recipe -> everything that `STEPS` steps leave: weights, projectors, memories; and the history.

    In double precision. In single precision AdamW makes steps of the learning rate out of any gradient that is nothing
    but rounding, and 20 such steps of one process are repeated by no other order of a sum.
    """
    torch.set_default_dtype(torch.float64)
    try:
        teacher = new_model(Run("phantom", "spleen", "T1", profile=TINY), 1).eval().requires_grad_(False)
        banks = doubled(blobs(5)), doubled(blobs(3, seed=1))
        found = {}
        for state in train_cohort(cohort(), *banks, STEPS, CPU, {"T1": teacher}, 1, processes=processes):
            assert state.failure is None, state.failure
            tensors = dict(state.model.state_dict())
            tensors |= {f"distiller.{k}": v for k, v in state.distiller.state_dict().items()}
            found[state.run.recipe.name] = {k: v.contiguous() for k, v in tensors.items()}, state.history
        return found
    finally:
        torch.set_default_dtype(torch.float32)


def work(processes: Processes, folder: str) -> None:
    """What each of two processes does for the tests: the trainings, and the exchanges that they are made of."""
    found = trained(processes)
    tensors = {f"{name}/{key}": value for name, (state, _) in found.items() for key, value in state.items()}
    safetensors.torch.save_file(tensors, Path(folder, f"{processes.rank}.safetensors"))
    whole = torch.arange(48.0, dtype=torch.float64).view(4, 3, 2, 2).sin()
    part = processes.share(whole).clone().requires_grad_()
    weight = torch.arange(48.0, dtype=torch.float64).view(4, 3, 2, 2)
    back = processes.gather(part)
    (back * weight).sum().backward()
    record = {
        "gathered": torch.equal(back.detach(), whole),
        "gradient": torch.equal(part.grad, processes.share(weight) * processes.size),
        "mean": processes.average(torch.tensor([float(processes.rank)])).item(),
        "highest": processes.highest(5 * processes.rank),
        "told": processes.broadcast({"of": processes.rank}),
        "history": {name: history for name, (_, history) in found.items()},
    }
    Path(folder, f"{processes.rank}.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two gloo processes found, each: tensors by name, and the rest."""
    folder = tmp_path_factory.mktemp("pair")
    launch(work, 2, CPU, str(folder))
    return [
        (safetensors.torch.load_file(folder / f"{i}.safetensors"), json.loads((folder / f"{i}.json").read_text()))
        for i in range(2)
    ]


def test_two_processes_give_the_weights_of_one_to_1e_7_after_20_steps(pair):
    """Weights, projectors, memories, and every logged number, measured gradients among them."""
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
    assert any("bank" in key and value.any() for key, value in pair[0][0].items()), "a memory was filled"


def test_the_processes_are_alike_to_the_bit(pair):
    (first, _), (second, _) = pair
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_processes_share_gather_and_agree(pair):
    for _, record in pair:
        assert record["gathered"] and record["gradient"]
        assert (record["mean"], record["highest"], record["told"]) == (0.5, 5, {"of": 0})


def test_one_process_alone_changes_nothing():
    maps = torch.randn(4, 3, 2, 2)
    assert ALONE.share(maps).equal(maps) and ALONE.gather(maps) is maps and ALONE.gather(None) is None
    assert ALONE.highest(3) == 3 and ALONE.broadcast("x") == "x"


# ----------------------------------------------------------------------------------------------------- from end to end


def taught(data: str = "phantom") -> Run:
    recipe = thesis_recipe("S1", only=("D-D", "PMD"))
    return Run(data, "spleen", "S1", fraction=0.5, teacher="T1", profile=TINY, recipe=recipe)


def train(file: Path, results: Path, processes: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-u", "-P", "-m", "kdlib", "train", file, "--results", results, "--device", "cpu"]
    quiet = os.environ | {"KDLIB_PROGRESS": "plain", "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    return subprocess.Popen(
        [*map(str, command), "--processes", str(processes)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet,
    )  # fmt: skip


def until(child: subprocess.Popen, pattern: str) -> None:
    said = []
    for line in child.stdout:
        said.append(line)
        if re.search(pattern, line):
            return
    pytest.fail(f"never said {pattern}: {''.join(said)} {child.stderr.read()}")


def last_process(parent: int) -> psutil.Process:
    """Of those that train, the one that was started last; multiprocessing's tracker of resources is none of them."""
    found = [c for c in psutil.Process(parent).children() if "spawn_main" in " ".join(c.cmdline())]
    return max(found, key=lambda child: child.create_time())


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_say_so_in_one_line_and_go_on_to_the_end_of_one(tmp_path, phantom_of):
    run, results = taught(str(phantom_of(9))), tmp_path / "pair"
    folder, file = run_folder(run, results), tmp_path / "run.json"
    file.write_text(json.dumps(to_json(run)))

    child = train(file, results)
    until(child, r"KD\(T1, ?S1\).*epoch 2/8")
    last_process(child.pid).kill()
    _, errors = child.communicate()
    assert child.returncode == 1, errors
    cause = r"^error: process \d of 2 was killed by SIGKILL, and the others were ended; finished runs are kept$"
    assert len(re.findall(cause, errors, re.MULTILINE)) == 1 and "Traceback" not in errors, errors
    # whether the first process has the time to write down why depends on who sees the death first
    assert json.loads((folder / "manifest.json").read_text())["status"] in ("training", "failed")

    child = train(file, results)
    said, errors = child.communicate()
    assert child.returncode == 0, errors
    assert "1 runs are done in" in said
    record = manifest(run, results)
    assert record["processes"] == 2 and record["steps"] == 32
    assert len(record["sessions"]) == 2 and record["sessions"][1]["from_step"] >= 8
    assert {session["processes"] for session in record["sessions"]} == {2}
    names = {path.name for path in folder.iterdir()}
    assert not any(re.match(r"\.\w{12}\.", name) for name in names) and "checkpoint.safetensors" not in names
    found = study([run], results, "cpu")
    assert manifest(run, results)["finished"] == record["finished"], "trained again"
    keys = [(case, "spleen", metric) for case in record["data"]["test"] for metric in METRICS]
    assert sorted(found.cases[["case", "class", "metric"]].itertuples(index=False, name=None)) == sorted(keys)
    assert len(record["data"]["test"]) == 3


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "error, kind, said",
    [
        ("kdlib.data.decathlon.DefectError: mine: 1 of 9 cases\n\ncase  defect\na: b  empty\n", InputError,
         "mine: 1 of 9 cases\n\ncase  defect\na: b  empty"),
        ("kdlib.strict.TrainingError: S1: a loss is not finite\nTypeError: x", TrainingError,
         "S1: a loss is not finite\nTypeError: x"),
        ("RuntimeError: InputError: none of ours", ProcessRaisedException, "none of ours"),
    ],
)  # fmt: skip
def test_what_a_process_says_is_said_whole_and_without_its_traceback(error, kind, said, tmp_path):
    head = "Traceback (most recent call last):\n"
    text = f"\n\n-- Process 1 terminated with the following error:\n{head}  File 'a', line 1\n    a.b: c()\n"
    text += f"OSError: first\n\nDuring handling of the above exception:\n\n{head}  File 'b', line 2\n    d()\n{error}"
    broken = mock.patch.object(parallel, "launch", side_effect=ProcessRaisedException(text, 1, 2))
    with broken, pytest.raises(kind) as caught:
        parallel.train([taught()], tmp_path / "results", 2, "cpu")
    assert str(caught.value) == said if kind is not ProcessRaisedException else said in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds no run"),
        ('["S1"]', "run"),
        ('{"data": "phantom", "target": "spleen"}', "missing"),
        ('{"data": "phantom", "target": "spleen", "model": "S1", "folds": 0}', "field 'folds' of a run does not exist"),
        ('{"data": "phantom", "target": "spleen", "model": "S1", "profile": "fast"}', "choose from quick"),
        ('{"data": "phantom", "target": "spleen", "model": "S9"}', "model 'S9' does not exist"),
        ('{"data": "phantom", "target": "spleen", "model": "S1", "fold": "a"}', "fold 'a'"),
    ],
)
def test_a_bad_description_is_one_line(text, message, tmp_path, capsys):
    file = tmp_path / "runs.json"
    if text is not None:
        file.write_text(text)
    assert main(["train", str(file), "--results", str(tmp_path / "results")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and re.search(message, errors), errors
    assert not (tmp_path / "results").exists()


def test_a_short_description_is_a_run():
    short = {"data": "phantom", "target": "spleen", "model": "S1", "profile": "ct128", "protocol": "thesis"}
    assert from_json(short) == Run("phantom", "spleen", "S1", profile=PROFILES["ct128"], protocol=PROTOCOLS["thesis"])


@pytest.mark.parametrize(
    "processes, message",
    [
        (3, "a batch of 16 images cannot be divided by 3 processes: take 2, 4, 8, 16 processes"),
        (0, "0 processes: give at least 1"),
    ],
)
def test_processes_that_cannot_be_are_refused_before_any_is_started(processes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        parallel.train([taught()], tmp_path / "results", processes, "cpu")
    assert not (tmp_path / "results").exists()
