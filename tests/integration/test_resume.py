"""A training that was stopped ends as one that never was; a checkpoint of something else is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_training import CPU, TINY, blobs, distilled, frozen_teacher, run_of, same

from kdlib.config import PROTOCOLS, InputError, Recipe, Run, Term
from kdlib.experiments.recipes import distiller
from kdlib.models import MODELS, ExternalModel
from kdlib.training import checkpoint as keeping
from kdlib.training import loop as training
from kdlib.training.checkpoint import Checkpoint, differences
from kdlib.training.interrupt import InterruptHandler
from kdlib.training.loop import train_cohort

STEPS = 2  # an epoch; there are two


def keep(folder, runs, **identity) -> list[Checkpoint]:
    return [Checkpoint(folder / str(i), {"run": i} | identity, "0123456789abcdef") for i in range(len(runs))]


def train(runs, teachers=None, checkpoints=()):
    return train_cohort(runs, blobs(3), blobs(1, seed=9), STEPS, CPU, teachers, None, checkpoints)


def kill_after(monkeypatch, steps: int, error: BaseException | None = None) -> None:
    """The process stops after so many optimiser steps of all arms together."""
    original, done = training.training_step, []

    def step(*args):
        if len(done) == steps:
            raise error or SystemExit(143)
        done.append(args)
        return original(*args)

    monkeypatch.setattr(training, "training_step", step)


def alike(arms, others) -> None:
    for arm, other in zip(arms, others, strict=True):
        assert same(arm.model.state_dict(), other.model.state_dict()), arm.run.label
        assert same(arm.best, other.best) and same(arm.best_distiller, other.best_distiller)
        assert arm.best_epoch == other.best_epoch and arm.history == other.history
        if arm.distiller is not None:
            assert same(arm.distiller.state_dict(), other.distiller.state_dict()), arm.run.label
        states = [x.optimiser.state_dict()["state"] for x in (arm, other)]
        assert all(same(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def stateful() -> list[Run]:
    """Every kind of state that a distilled student can have, one run each."""
    at = {"student_layers": "bottleneck"}
    kinds = {
        "memory": (Term("B-B", "supcon", 0.2, 0.1, options={"memory": 64, "same_patient": True}),),
        "crd": (Term("x", "crd", 0.2, options={"memory": 40}, **at),),
        "cirkd": (Term("x", "cirkd", 0.2, options={"pixel_memory": 64, "region_memory": 16}, **at),),
        "redrawn": (Term("B-B", "infonce", 0.2, 0.4),),
        "frozen": (Term("B-B", "infonce", 0.2, 0.4, projector="frozen"),),
    }
    recipes = [Recipe(name, terms=terms, redrawn_projectors=name == "redrawn") for name, terms in kinds.items()]
    recipes.append(Recipe("balance", terms=(Term("B-B", "fitnet", 1.0), Term("PMD", "kl", 3.0, 4.0)), balance=0.5))
    return [run_of("S1", teacher="T1", recipe=recipe, fraction=0.5) for recipe in recipes] + [distilled()]


@pytest.fixture(scope="module")
def whole_stateful() -> list:
    return train(stateful(), frozen_teacher())


def pair() -> list[Run]:
    return [distilled(), distilled(("PMD",))]


@pytest.fixture(scope="module")
def whole_pair() -> list:
    return train(pair(), frozen_teacher())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_kind_of_state_is_kept_to_the_bit(tmp_path, monkeypatch, whole_stateful, steps):
    """Stopped within the first epoch, at its end, and within the second; arms of a cohort at different steps."""
    runs, teacher = stateful(), frozen_teacher()
    assert [arm.failure for arm in whole_stateful] == [None] * len(runs)
    with monkeypatch.context() as patch:
        kill_after(patch, steps * len(runs) + 3)  # three arms are one step further on
        with pytest.raises(SystemExit):
            train(runs, teacher, keep(tmp_path, runs))
    again = train(runs, teacher, keep(tmp_path, runs))
    assert {arm.sessions[-1]["from_step"] for arm in again} == {steps, steps + 1}
    alike(again, whole_stateful)


@pytest.mark.parametrize(
    "run",
    [run_of("T1"), run_of("T2"), run_of("S1"), dataclasses.replace(distilled(), protocol=PROTOCOLS["thesis"])],
    ids=["T1", "T2", "S1", "published optimiser"],
)
def test_each_network_and_optimiser_resumes_to_the_bit(tmp_path, monkeypatch, run):
    teacher = frozen_teacher() if run.teacher else None
    whole = train([run], teacher)
    with monkeypatch.context() as patch:
        kill_after(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train([run], teacher, keep(tmp_path, [run]))
    alike(train([run], teacher, keep(tmp_path, [run])), whole)


@pytest.mark.slow
def test_distillers_of_every_family_resume_to_the_bit(tmp_path, monkeypatch):
    losses = ("dkd", "boundary_kl", "reviewkd", "emkd_importance", "ifvd", "prototype")
    runs = [run_of("S1", teacher="T1", recipe=distiller(loss, "S1"), fraction=0.5) for loss in losses]
    teacher = frozen_teacher()
    whole = train(runs, teacher)
    with monkeypatch.context() as patch:
        kill_after(patch, 2 * len(runs) + 3)
        with pytest.raises(SystemExit):
            train(runs, teacher, keep(tmp_path, runs))
    alike(train(runs, teacher, keep(tmp_path, runs)), whole)


def test_layers_that_draw_numbers_resume_to_the_bit_alone_and_in_a_cohort(tmp_path, monkeypatch):
    """Dropout takes torch's own random numbers, whose state nobody could share in a cohort."""

    def build(spatial_dims, in_channels, out_channels):
        first, last = torch.nn.Conv2d(in_channels, 8, 3, padding=1), torch.nn.Conv2d(8, out_channels, 1)
        return ExternalModel(torch.nn.Sequential(first, torch.nn.Dropout(0.5), last), {"bottleneck": "0"})

    monkeypatch.setitem(MODELS, "Net", build)
    runs = [run_of("Net"), run_of("S1")]
    whole = train(runs)
    torch.manual_seed(5)
    alike([train([run])[0] for run in runs], whole)
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(SystemExit):
            train(runs, None, keep(tmp_path, runs))
    torch.rand(3)
    before = torch.get_rng_state()
    alike(train(runs, None, keep(tmp_path, runs)), whole)
    assert torch.equal(torch.get_rng_state(), before), "the caller's own random numbers are left alone"


@pytest.mark.parametrize("steps, seconds, kept", [(7, 600, STEPS), (2, 0, 1)], ids=["the last epoch", "within one"])
def test_a_kill_without_warning_resumes_from_what_was_saved(tmp_path, monkeypatch, whole_pair, steps, seconds, kept):
    """At the end of an epoch, and within a long one."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", seconds)
    with monkeypatch.context() as patch:
        kill_after(patch, steps, OSError("as good as SIGKILL: nothing is saved"))
        with pytest.raises(OSError):
            train(pair(), frozen_teacher(), keep(tmp_path, pair()))
    again = train(pair(), frozen_teacher(), keep(tmp_path, pair()))
    assert [arm.sessions[-1]["from_step"] for arm in again] == [kept, kept]
    alike(again, whole_pair)


def test_an_arm_that_joins_later_and_one_that_fails_leave_the_others_as_they_are(tmp_path, monkeypatch):
    runs, teacher = [distilled(), distilled(("PMD",)), distilled(("E-E",), "fitnet")], frozen_teacher()
    whole, checkpoints = train(runs, teacher), keep(tmp_path, runs)
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(SystemExit):
            train(runs[:1], teacher, checkpoints[:1])
    checkpoints[1].folder.mkdir(exist_ok=True)
    checkpoints[1].path.write_bytes(checkpoints[0].path.read_bytes())  # of another run
    again = train(runs, teacher, checkpoints)
    assert isinstance(again[1].failure, InputError) and "is of another run: run 0 -> 1" in str(again[1].failure)
    assert [arm.sessions[-1]["from_step"] for arm in again if arm.failure is None] == [3, 0]
    alike(again[::2], whole[::2])


# ------------------------------------------------------------------------------------------------------------ refusals


IDENTITY = {"recipe": {"terms": [{"weight": 0.1}]}, "data": "aa"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A training to its end: its checkpoint, and what it left."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train([run_of("S1")], None, keep(folder, [0], **IDENTITY))


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of that checkpoint, to be changed."""
    return shutil.copytree(finished[0], tmp_path / "saved")


def resumed(folder, **identity):
    return train([run_of("S1")], None, keep(folder, [0], **IDENTITY | identity))


def test_a_finished_training_is_not_trained_again(saved, finished, monkeypatch):
    monkeypatch.setattr(training, "training_step", lambda *args: pytest.fail("trained a step more"))
    alike(resumed(saved), finished[1])


@pytest.mark.parametrize(
    "identity, difference",
    [
        ({"recipe": {"terms": [{"weight": 0.2}]}}, "recipe.terms.0.weight 0.1 -> 0.2"),
        ({"data": "bb"}, "data aa -> bb"),
        ({"recipe": {"terms": []}}, r"recipe.terms \[\{'weight': 0.1\}\] -> \[\]"),
    ],
)
def test_a_checkpoint_of_another_recipe_or_data_set_is_refused(saved, identity, difference):
    with pytest.raises(InputError, match=f"checkpoint.safetensors is of another run: {difference}; delete that file"):
        raise resumed(saved, **identity)[0].failure


def test_a_checkpoint_of_another_version_of_the_code_is_refused(saved, monkeypatch):
    monkeypatch.setattr(keeping, "CODE", keeping.CODE | {"kdlib/training/loop.py": "0" * 12, "kdlib/new.py": "1" * 12})
    failure = resumed(saved)[0].failure
    assert isinstance(failure, InputError) and "\n" not in str(failure)
    assert "another version of kdlib/new.py, kdlib/training/loop.py: delete that file" in str(failure)
    assert str(failure).endswith("or check out commit 012345678")


def test_a_checkpoint_holds_no_pickle_and_one_of_a_newer_version_is_refused(saved):
    path = saved / "0" / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["kdlib"])
    assert head["state"]["step"] == TINY.student_epochs * STEPS and head["code"]["kdlib/training/loop.py"]
    assert load_file(path).keys() >= {"optimiser/0/exp_avg"}
    save_file(load_file(path), path, {"kdlib": json.dumps(head | {"format": 99})})
    failure = resumed(saved)[0].failure
    assert isinstance(failure, InputError) and "newer version (format 99); update kdlib" in str(failure)


def damage(path, how: str) -> None:
    blob = bytearray(path.read_bytes())
    if how == "truncated":
        del blob[len(blob) // 2 :]
    elif how == "empty":
        blob.clear()
    elif how == "garbage":
        blob[:] = bytes(range(256)) * 40
    elif how == "one bit":
        blob[-1000] ^= 4
    elif how == "no record":
        save_file(load_file(path), path)
        return
    path.write_bytes(blob)


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage", "one bit", "no record"])
def test_a_damaged_checkpoint_is_named_and_the_training_starts_anew(saved, finished, capsys, how):
    damage(saved / "0" / "checkpoint.safetensors", how)
    again = resumed(saved)
    said = [line for line in capsys.readouterr().out.splitlines() if "checkpoint.safetensors is damaged" in line]
    assert len(said) == 1 and "training starts again" in said[0]
    assert again[0].sessions[-1]["from_step"] == 0
    alike(again, finished[1])


def test_differences_are_named_by_their_place():
    assert differences({"a": [1, {"b": 2}], "c": 3}, {"a": [1, {"b": 4}], "d": 5}) == [
        "a.1.b 2 -> 4", "c 3 -> None", "d None -> 5",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize("number, error", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_waits_for_what_is_held_and_else_stops_at_once(number, error):
    before, done = signal.getsignal(number), []
    with pytest.raises(error) as caught, InterruptHandler() as stops:
        with stops.deferred():
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            done.append("whole")
        pytest.fail("went on")
    assert done == ["whole"]
    with pytest.raises(error), InterruptHandler():
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("waited")
    assert signal.getsignal(number) is before
    if error is SystemExit:
        assert caught.value.code == 143


@pytest.mark.parametrize("when", ["step", "validation", "batch"])
def test_a_scheduler_stops_a_training_within_a_step(tmp_path, monkeypatch, whole_pair, when):
    runs, teacher = pair(), frozen_teacher()
    place = {"step": "training_step", "validation": "volume_dice", "batch": "load_batch"}[when]
    original, calls = getattr(training, place), []

    def call(*args, **kwargs):
        calls.append(place)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # schedulers send it to every process of a job, and parents pass it on
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, place, call)
        with pytest.raises(SystemExit, match="143"):
            train(runs, teacher, keep(tmp_path, runs))
        assert len(calls) == 3
    log = (tmp_path / "0" / "log.txt").read_text()
    assert "stopped at step" in log
    again = train(runs, teacher, keep(tmp_path, runs))
    assert all(arm.sessions[-1]["from_step"] > 0 for arm in again)
    alike(again, whole_pair)
