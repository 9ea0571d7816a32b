"""Protocol and model cards: what they say is what the manifests say, and what these do not say is "not recorded"."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest

import kdlib.analysis.cards
from kdlib.analysis.cards import FAULTS, WHY, write_cards
from kdlib.analysis.metrics import METRICS
from kdlib.config import SWITCHES, InputError, Preprocessing, Profile, Run
from kdlib.experiments.recipes import thesis_recipe
from kdlib.experiments.runner import study

TERMS = [dict(name="PMD", loss="kl", weight=0.2, temperature=4.0, projector="learned")]
DICE = {"c1": 0.5, "c2": 0.8, "c3": 0.9, "c4": 0.7}


def recipe(name: str, terms=(), **changes) -> dict:
    return dict(name=name, segmentation="dice", segmentation_weight=0.4, terms=list(terms)) | changes


def manifest(key: str, arm: str, digest: str, effective_recipe: dict, **changes) -> dict:
    """A manifest of the first form, with `changes` to its run."""
    model = "T1" if arm == "T1" else "S1"
    view = dict(size=64, spacing=1.5, channels="repeat", window=[-125.0, 275.0], percentiles=[0.5, 99.5])
    profile = dict(preprocessing=view, teacher_epochs=2, student_epochs=2, teacher_steps=5, student_steps=3, folds=3)
    run = dict(data="Toy", target="spleen", model=model, fold=0, fraction=1.0 if arm == "T1" else 0.5, teacher=None)
    run |= dict(recipe=effective_recipe, seed=0, teacher_seed=0, on_defect="raise", protocol={"name": "corrected"})
    run |= dict(profile=profile | {"reduced_from_thesis": "toy size"})
    train = ["c5", "c6", "c7"] if run["fraction"] == 1 else ["c5"]
    return dict(
        key=key, arm=arm, run=run | changes, effective_recipe=effective_recipe, parameters=57_297 if model == "S1" else 1_000_000,
        data=dict(digest=digest, train=train, val=["c8"], test=list(DICE)), best=dict(epoch=2, val_dice=0.75),
        seconds=dict(training=12.5, evaluation=1.0), device="cpu", precision="fp32", threads=1,
        versions=dict(python="3.12.1", torch="2.11.0"), git=dict(commit="abc123", dirty=False),
        finished="2026-01-02T03:04:05+0000", status="done",
    )  # fmt: skip


class Toy:
    """A results folder with one study of a teacher, a baseline and a distilled student."""

    def __init__(self, root: Path):
        self.results, self.folder = root, root / "toy"
        patients = {f"c{number}": f"p{(number + 1) // 2}" for number in range(1, 9)}  # two cases a patient
        split = json.dumps({"cases": {case: {"patient": patient} for case, patient in patients.items()}})
        (root / "splits").mkdir()
        (root / "splits" / "toy.json").write_text(split)
        digest = hashlib.sha256(split.encode()).hexdigest()
        self.records = {
            "t1": manifest("t1", "T1", digest, recipe("teacher", segmentation="dice+ce", reconstruction_weight=0.2)),
            "s1": manifest("s1", "S1 (50 %)", digest, recipe("baseline")),
            "kd": manifest("kd", "KD(T1, S1)", digest, recipe("taught", TERMS), teacher="T1"),
        }
        tables = self.folder / "tables"
        tables.mkdir(parents=True)
        pd.DataFrame({"case": list(patients), "patient": patients.values(), "z": range(10, 18)}).to_csv(
            tables / "00_data_cases.csv", index=False
        )
        self.write()

    def write(self) -> None:
        cases = []
        for key, record in self.records.items():
            folder = self.results / "runs" / key
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").write_text(json.dumps(record))
            pd.DataFrame({"epoch": [1, 1, 2], "name": "loss", "value": 1.0}).to_csv(folder / "history.csv", index=False)
            (folder / "best.safetensors").write_bytes(b"weights of " + key.encode())
            for case, dice in DICE.items():
                row = dict(run=key, arm=record["arm"], seed=record["run"]["seed"], fold=record["run"]["fold"])
                row |= dict(patient=f"p{(int(case[1]) + 1) // 2}", case=case) | {"class": "spleen"}
                value = dice if key == "kd" else dice - 0.1
                cases += [row | dict(metric="dice", value=value), row | dict(metric="hd95", value=None)]
        runs = pd.DataFrame([dict(run=key, arm=record["arm"]) for key, record in self.records.items()])
        runs.to_csv(self.folder / "tables" / "02_distillation_runs.csv", index=False)
        pd.DataFrame(cases).to_csv(self.folder / "tables" / "02_distillation_cases.csv", index=False)

    def protocol(self) -> str:
        return write_cards(self.folder, self.results)[0].read_text(encoding="utf-8")


@pytest.fixture
def toy(tmp_path) -> Toy:
    return Toy(tmp_path)


def rows(text: str, start: str) -> list[list[str]]:
    """The cells of all table rows that begin with `start`."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {start}")]


def test_data_flow_counts_patients_volumes_and_slices(toy):
    text = toy.protocol()
    # c5, c6 are of patient p3, c7, c8 of p4: p4 trains and selects, but is not tested
    assert rows(text, "0 | training |") == [["0", "training", "2", "3", str(14 + 15 + 16)]]
    assert rows(text, "0 | training, 50 %") == [["0", "training, 50 % of the labels", "1", "1", "14"]]
    assert rows(text, "0 | test") == [["0", "test", "2", "4", str(10 + 11 + 12 + 13)]]
    assert rows(text, "all |")[0][2:] == ["4", "8", str(sum(range(10, 18)))]
    assert "defective cases left out: none" in text
    assert "**Fold 0, test** (2 patients, 4 volumes): c1, c2, c3, c4" in text
    assert "in another part of one fold: none" in text and "LEAKAGE" not in text


def test_a_patient_in_two_parts_is_said_loudly(toy):
    toy.records["kd"]["data"]["train"] = ["c1", "c5"]
    toy.write()
    text = toy.protocol()
    assert "LEAKAGE: 1 patient in the test part" in text and "in another part of one fold: p1" in text


def test_without_the_split_patients_come_from_the_table_of_cases(toy):
    (toy.results / "splits" / "toy.json").unlink()
    assert rows(toy.protocol(), "0 | test")[0][2:4] == ["2", "4"]


def test_budgets_are_those_of_the_manifests(toy):
    text = toy.protocol()
    assert rows(text, "T1 | teacher") == [
        ["T1", "teacher", "corrected", "1000000", "adamw, cosine", "0.001", "16", "2", "5", "10", "0", "0", "1", "12.5"]
    ]
    assert rows(text, "KD(T1, S1)")[0][7:10] == ["2", "3", "6"]
    assert "taught (corrected): dice x 0.4 + PMD (KL (Hinton), temperature 4) x 0.2" in text
    assert "not all have the same budget" not in text  # teachers and students are each of one budget


def test_unequal_budgets_are_said_with_the_arms(toy):
    toy.records["both"] = json.loads(json.dumps(toy.records["s1"])) | {"key": "both", "steps": 12}
    toy.records["both"]["run"]["recipe"]["name"] = "both budgets"
    toy.write()
    text = toy.protocol()
    assert "the students do not all have the same budget; most (2 of 3 runs) have adamw, cosine" in text
    assert "- with updates 12: S1 (50 %) (both budgets)" in text


def test_published_optimisers_of_both_forms_of_manifest(toy):
    published = dict(optimiser="rmsprop", lr=0.01, batch=20, schedule="constant")
    toy.records["kd"]["run"]["protocol"] |= {"own_optimisers": True}
    toy.records["s1"]["run"]["protocol"] |= {"baseline": published}
    toy.write()
    text = toy.protocol()
    assert rows(text, "KD(T1, S1)")[0][4:7] == ["rmsprop, constant", "0.01", "20"]
    assert rows(text, "S1 (50 %)")[0][4:7] == ["rmsprop, constant", "0.01", "20"]


def test_versions_of_the_code_and_uncommitted_changes_are_limits(toy):
    toy.records["kd"]["git"] = dict(commit="def456", dirty=True)
    toy.records["s1"]["hardware"] = dict(cpu="A CPU", cores=8)
    toy.records["s1"]["code"] = dict(hash="c0de")
    toy.write()
    text = toy.protocol()
    assert "the runs come from 2 versions of the code" in text
    assert "1 of 3 runs were made with uncommitted changes" in text
    assert rows(text, "def456") == [["def456", "with uncommitted changes", "not recorded", "1"]]
    assert rows(text, "abc123") == [
        ["abc123", "clean", "not recorded", "1"], ["abc123", "clean", "c0de", "1"]
    ]  # fmt: skip
    assert rows(text, "cpu | A CPU")[0][2:4] == ["8", "1"] and rows(text, "cpu | not recorded")[0][-1] == "2"


def test_kept_faults_are_limits_and_change_the_selection(toy):
    toy.records["kd"]["run"]["protocol"] = {"name": "thesis"} | dict.fromkeys(SWITCHES, True)
    toy.write()
    text = toy.protocol()
    for words in FAULTS.values():
        assert f"published fault kept by protocol 'thesis': {words}" in text
    assert "- thesis: Dice of the test part after each epoch, of the pixels of all its slices together" in text
    assert "- corrected: Dice of the validation part after each epoch, by volume" in text
    assert rows(text, "64 x 64 | ignored") and rows(text, "64 x 64 | 1.5 mm")
    assert FAULTS.keys() == SWITCHES.keys()


def test_few_patients_seeds_and_folds_are_limits(toy):
    text = toy.protocol()
    for words in ("size: toy size", "only fold 0 of 3 was tested: 2 patients", "2 test patients", "one seed an arm"):
        assert words in text


def test_families_that_can_decide_nothing_are_named(toy):
    for name, n in (("few", 6), ("many", 12)):
        table = pd.DataFrame(dict(a="x", b="y", n=[n] * 3, p_holm=[0.9, 0.9, 0.01]))
        table["verdict"] = ["inconclusive", "inconclusive", "better"]
        table.to_csv(toy.folder / "tables" / f"02_{name}.csv", index=False)
    text = toy.protocol()
    # 2 / 2^6 and 2 / 2^12, each three times
    assert rows(text, "02_few")[0][1:5] == ["3", "6", "0.094", "no, whatever the data: too few patients"]
    assert rows(text, "02_many")[0][1:] == ["3", "12", "0.0015", "yes", "2 inconclusive, 1 better"]


def test_metrics_say_why_and_how_often_they_are_undefined(toy):
    text = toy.protocol()
    assert rows(text, "HD95")[0][:5] == ["HD95", "mm", "less", "12", "12"]
    assert WHY.keys() == METRICS.keys()


def test_a_card_for_each_student_with_weights(toy):
    written = write_cards(toy.folder, toy.results)
    assert [path.name for path in written] == ["protocol.md", "s1-50-s1.md", "kd-t1-s1-kd.md"]
    text = written[2].read_text(encoding="utf-8")
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    asked = "Model details, Intended use, Factors, Metrics, Training data, Evaluation data, Quantitative analyses"
    assert set(asked.split(", ")) | {"Ethical considerations", "Caveats and recommendations"} <= set(headings)
    assert "Not for clinical use" in text and "57,297 parameters" in text
    assert hashlib.sha256(b"weights of kd").hexdigest() in text
    assert "teacher: T1 (trained), run t1" in text and "teacher: none" in written[1].read_text(encoding="utf-8")
    # patients p1 and p2: (0.65 + 0.8) / 2
    assert rows(text, "all | Dice")[0][2::2] == ["0.725", "2"]
    assert rows(text, "all | HD95")[0][2] == "undefined"
    assert [row[0] for row in rows(text, "this model") + rows(text, "teacher |") + rows(text, "alone")] == [
        "this model", "teacher", "alone"
    ]  # fmt: skip
    assert [row[:3] for row in rows(text, "p")[1:]] == [
        ["p1", "c1", "0.500"], ["p2", "c4", "0.700"], ["p1", "c2", "0.800"]
    ]  # fmt: skip
    (toy.results / "runs" / "kd" / "best.safetensors").unlink()
    assert [path.name for path in write_cards(toy.folder, toy.results)] == ["protocol.md", "s1-50-s1.md"]


def test_a_random_teacher_is_no_run(toy):
    toy.records["kd"]["run"]["recipe"]["teacher"] = "random"
    toy.records["kd"]["teachers"] = {"T1": "t1"}
    toy.write()
    text = write_cards(toy.folder, toy.results)[2].read_text(encoding="utf-8")
    assert "teacher: T1 with random weights" in text and not rows(text, "teacher |")


def test_a_teacher_outside_of_the_tables_is_part_of_the_protocol(toy):
    toy.records["kd"]["teachers"] = {"T1": "t1"}
    toy.write()
    runs = toy.folder / "tables" / "02_distillation_runs.csv"
    pd.read_csv(runs).query("run != 't1'").to_csv(runs, index=False)
    assert rows(toy.protocol(), "T1 | teacher")


def test_missing_and_unfinished_runs_are_named(toy):
    toy.records["s1"] |= {"status": "training"}
    toy.write()
    (toy.results / "runs" / "t1" / "manifest.json").unlink()
    (toy.results / "runs" / "kd" / "manifest.json").write_text("{")
    with pytest.raises(InputError) as error:
        write_cards(toy.folder, toy.results)
    message = str(error.value)
    assert "3 of 3 runs" in message and "run the study again" in message and "\n" not in message
    for words in ("t1/manifest.json (T1) is missing", "s1/manifest.json", "not done (training)", "cannot be read"):
        assert words in message
    assert not (toy.folder / "protocol.md").exists()


def test_a_study_without_tables_is_named(tmp_path):
    with pytest.raises(InputError, match=r"holds no \*_runs.csv: run a notebook of this study first"):
        write_cards(tmp_path / "none", tmp_path)


def test_cards_need_no_torch():
    nodes = list(ast.walk(ast.parse(Path(kdlib.analysis.cards.__file__).read_text(encoding="utf-8"))))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    assert {name.split(".")[0] for name in imported} <= {
        "__future__", "collections", "hashlib", "json", "pathlib", "re", "pandas", "kdlib"
    }  # fmt: skip
    assert {name for name in imported if name.startswith("kdlib")} == {
        "kdlib.config", "kdlib.analysis.metrics", "kdlib.analysis.statistics"
    }  # fmt: skip


@pytest.mark.slow
def test_cards_of_a_real_study(tmp_path):
    setting = dict(
        data="phantom", target="spleen", profile=Profile("tiny", Preprocessing(64, 6.0), 0.125, 1, 1, 2, 2, folds=3)
    )
    runs = [
        Run(model="T1", **setting),
        Run(model="S1", fraction=0.5, **setting),
        Run(model="S1", fraction=0.5, teacher="T1", recipe=thesis_recipe("S1"), **setting),
    ]
    study(runs, tmp_path, "cpu").save(tmp_path / "tiny", "02_distillation")
    protocol, *cards = write_cards(tmp_path / "tiny", tmp_path)
    text = protocol.read_text(encoding="utf-8")
    assert rows(text, "KD(T1, S1)")[0][7:10] == ["1", "2", "2"] and "B-B (supervised contrastive loss" in text
    assert rows(text, "0 | test")[0][2:] == ["5", "5", "not recorded"]
    assert len(cards) == 2 and "run not recorded" not in cards[1].read_text(encoding="utf-8")
