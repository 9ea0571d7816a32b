"""Protocol and model cards: what they say is what the manifests say, and what these do not say is "not recorded"."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest
from analysis_tables import identity

from kdlib.analysis.cards import FAULTS, WHY, write_cards
from kdlib.config import PROTOCOLS, SWITCHES, InputError, Preprocessing, Recipe, Run, Term, override_profile, to_json
from kdlib.metrics import METRICS

DICE = {"c1": 0.5, "c2": 0.8, "c3": 0.9, "c4": 0.7}
RECIPE = Recipe("distilled", terms=(Term("PMD", "kl", 0.2, 4.0),))


class Toy:
    """A results folder with one study of a teacher, a baseline and a distilled student."""

    def __init__(self, root: Path):
        self.folder = root / "toy"
        patients = {f"c{number}": f"p{(number + 1) // 2}" for number in range(1, 9)}  # two cases per patient
        split = json.dumps({"cases": {case: {"patient": patient} for case, patient in patients.items()}})
        (root / "splits").mkdir()
        (root / "splits" / "toy.json").write_text(split)
        self.digest = hashlib.sha256(split.encode()).hexdigest()
        profile = dataclasses.replace(
            override_profile("quick"), folds=3, reduced_from_thesis="toy size", preprocessing=Preprocessing(64, 1.5)
        )
        self.setting = dict(data="Toy", target="spleen", profile=profile)
        student = Run(model="S1", fraction=0.5, **self.setting)
        self.runs = {"t1": Run(model="T1", **self.setting), "s1": student}
        self.runs["kd"] = dataclasses.replace(student, teacher="T1", recipe=RECIPE)
        self.names = {"t1": "T1", "s1": "S1 (50 %)", "kd": "KD(T1, S1)"}
        self.changes: dict[str, dict] = {"kd": {"teachers": {"T1": "t1"}}}
        (self.folder / "tables").mkdir(parents=True)
        volumes = pd.DataFrame({"case": list(patients), "patient": patients.values(), "z": range(10, 18)})
        volumes.to_csv(self.folder / "tables" / "00_data_cases.csv", index=False)

    def manifests(self) -> dict[str, dict]:
        return {key: self.manifest(key, run) for key, run in self.runs.items()}

    def manifest(self, key: str, run: Run) -> dict:
        train = ["c5", "c6", "c7"] if run.fraction == 1 else ["c5"]
        record = dict(
            key=key, identity=identity(self.names[key], protocol=run.protocol.name, fold=0, seed=run.seed),
            run=to_json(run), parameters=57_297 if run.model == "S1" else 1_000_000, teachers={},
            data=dict(digest=self.digest, train=train, val=["c8"], test=list(DICE)), best=dict(epoch=2, val_dice=0.75),
            seconds=dict(training=12.5, evaluation=1.0), device="cpu", precision="fp32", threads=1, steps=6,
            versions=dict(python="3.12.1", torch="2.11.0"), git=dict(commit="abc123", dirty=False),
            files={"best.safetensors": f"hash of {key}"}, finished="2026-01-02T03:04:05+0000", status="done",
        )  # fmt: skip
        return record | self.changes.get(key, {})

    def write(self) -> list[Path]:
        cases, history = [], []
        for key, record in self.manifests().items():
            history += [record["identity"] | dict(run=key, epoch=epoch, name="loss", value=1.0) for epoch in (1, 2)]
            for case, dice in DICE.items():
                row = record["identity"] | dict(run=key, patient=f"p{(int(case[1]) + 1) // 2}", case=case)
                row |= {"class": "spleen"}
                cases += [row | dict(metric="dice", value=dice if key == "kd" else dice - 0.1)]
                cases += [row | dict(metric="hd95", value=None)]
        for part, table in (("cases", cases), ("history", history)):
            pd.DataFrame(table).to_csv(self.folder / "tables" / f"02_distillation_{part}.csv", index=False)
        return write_cards(self.folder, self.manifests())

    def protocol(self) -> str:
        return self.write()[0].read_text(encoding="utf-8")


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
    (toy.folder.parent / "splits" / "toy.json").unlink()
    assert rows(toy.protocol(), "0 | test")[0][2:4] == ["2", "4"]  # patients of the table of cases


def test_a_patient_in_two_parts_is_said_loudly(toy):
    toy.changes["kd"] |= {"data": dict(digest=toy.digest, train=["c1", "c5"], val=["c8"], test=list(DICE))}
    text = toy.protocol()
    assert "LEAKAGE: 1 patient in the test part" in text and "in another part of one fold: p1" in text


def test_budgets_are_those_of_the_manifests(toy):
    text = toy.protocol()
    assert rows(text, "T1 | dice+ce x 1")[0][2:5] == ["corrected", "1000000", "adamw, cosine"]
    assert rows(text, "KD(T1, S1)")[0][1] == "dice+ce x 0.4 + PMD (kl, temperature 4) x 0.2"
    assert rows(text, "KD(T1, S1)")[0][7:9] == ["2", "6"] and rows(text, "KD(T1, S1)")[0][-1] == "12.5"
    assert "not all have the same budget" not in text  # teachers and students are each of one budget
    toy.changes["s1"] = {"steps": 12}
    toy.runs["s2"], toy.names["s2"] = dataclasses.replace(toy.runs["s1"], seed=1), "S1 (50 %)"
    text = toy.protocol()
    assert "the students do not all have the same budget; most (2 of 3 runs) have adamw, cosine" in text
    assert "- with updates 12: S1 (50 %)" in text and "methods have 1 to 2 seeds per fold" in text


def test_versions_of_the_code_and_uncommitted_changes_are_limits(toy):
    toy.changes["kd"] |= {"git": dict(commit="def456", dirty=True)}
    toy.changes["s1"] = {"hardware": dict(cpu="A CPU", cores=8), "code": dict(hash="c0de")}
    text = toy.protocol()
    assert "the runs come from 2 versions of the code" in text
    assert "1 of 3 runs were made with uncommitted changes" in text
    assert rows(text, "def456") == [["def456", "with uncommitted changes", "not recorded", "1"]]
    assert rows(text, "abc123") == [
        ["abc123", "clean", "not recorded", "1"], ["abc123", "clean", "c0de", "1"]
    ]  # fmt: skip
    assert rows(text, "cpu | A CPU")[0][-1] == "1" and rows(text, "cpu | not recorded")[0][-1] == "2"


def test_kept_faults_are_limits_and_change_the_selection(toy):
    toy.runs["kd"] = dataclasses.replace(toy.runs["kd"], protocol=PROTOCOLS["thesis"])
    text = toy.protocol()
    for words in FAULTS.values():
        assert f"published fault kept by protocol 'thesis': {words}" in text
    assert "- thesis: Dice of the test part after each epoch, of the pixels of all its slices together" in text
    assert "- corrected: Dice of the validation part after each epoch, by volume" in text
    assert rows(text, "64 x 64 | ignored") and rows(text, "64 x 64 | 1.5 mm")
    assert rows(text, "KD(T1, S1)")[0][1].startswith("dice x 0.4 + PMD (softmax_kl")  # the effective recipe
    assert rows(text, "KD(T1, S1)")[0][4:7] == ["rmsprop, constant", "0.01", "20"]
    assert FAULTS.keys() == SWITCHES.keys()


def test_few_patients_seeds_and_folds_are_limits(toy):
    text = toy.protocol()
    for words in (
        "size: toy size",
        "only fold 0 of 3 was tested: 2 patients",
        "2 test patients",
        "one seed per method",
    ):
        assert words in text


def test_families_that_can_decide_nothing_are_named(toy):
    for name, n, least in (("few", 6, 0.094), ("many", 12, 0.0015)):
        table = pd.DataFrame(dict(a="x", b="y", n=[n] * 3, p_holm=[0.9, 0.9, 0.01], smallest_p=least))
        table["verdict"] = ["inconclusive", "inconclusive", "better"]
        table.to_csv(toy.folder / "tables" / f"02_{name}.csv", index=False)
    asked = table.assign(question=["networks", "networks", "labels"])
    asked.to_csv(toy.folder / "tables" / "10_comparisons.csv", index=False)
    for again in ("02_answer", "02_classes"):
        table.assign(**{"class": "spleen"}).to_csv(toy.folder / "tables" / f"{again}.csv", index=False)
    classes = table.assign(**{"class": ["NA", "spleen", "NA"]})
    classes.to_csv(toy.folder / "tables" / "03_classes.csv", index=False)
    text = toy.protocol()
    assert rows(text, "03_classes"), "two classes, of which one is called NA"
    assert "02_answer" not in text and "02_classes" not in text, "the tests of 02_comparisons once more"
    assert [row[1] for row in rows(text, "10_comparisons, ")] == ["2", "1"], "a family for each question"
    assert rows(text, "02_few")[0][1:5] == ["3", "6", "0.094", "no, whatever the data: too few patients"]
    assert rows(text, "02_many")[0][1:] == ["3", "12", "0.0015", "yes", "2 inconclusive, 1 better"]


def test_metrics_say_why_and_how_often_they_are_undefined(toy):
    assert rows(toy.protocol(), "HD95")[0][:5] == ["HD95", "mm", "less", "12", "12"]
    assert WHY.keys() == METRICS.keys()


def test_a_card_for_each_student_with_weights(toy):
    written = toy.write()
    assert [path.name for path in written] == ["protocol.md", "s1-50-s1.md", "kd-t1-s1-kd.md"]
    text = written[2].read_text(encoding="utf-8")
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    asked = "Model details, Intended use, Factors, Metrics, Training data, Evaluation data, Quantitative analyses"
    assert set(asked.split(", ")) | {"Ethical considerations", "Caveats and recommendations"} <= set(headings)
    assert "Not for clinical use" in text and "57,297 parameters" in text and "`hash of kd`" in text
    assert "teacher: T1 (trained), run t1" in text and "teacher: none" in written[1].read_text(encoding="utf-8")
    # patients p1 and p2: (0.65 + 0.8) / 2
    assert rows(text, "all | Dice")[0][2::2] == ["0.725", "2"] and rows(text, "all | HD95")[0][2] == "undefined"
    compared = rows(text, "this model") + rows(text, "teacher |") + rows(text, "without a teacher")
    assert [row[1] for row in compared] == ["KD(T1, S1)", "T1", "S1 (50 %)"]
    assert [row[:3] for row in rows(text, "p")[1:]] == [
        ["p1", "c1", "0.500"], ["p2", "c4", "0.700"], ["p1", "c2", "0.800"]
    ]  # fmt: skip
    toy.changes["kd"] |= {"files": {}}
    assert [path.name for path in toy.write()] == ["protocol.md", "s1-50-s1.md"]


def test_a_random_teacher_is_no_run(toy):
    toy.runs["kd"] = dataclasses.replace(toy.runs["kd"], recipe=dataclasses.replace(RECIPE, teacher="random"))
    text = toy.write()[2].read_text(encoding="utf-8")
    assert "teacher: T1 with random weights" in text and not rows(text, "teacher |")


def test_a_student_that_only_teaches_another_gets_no_card(toy):
    written = toy.write()
    records = toy.manifests()
    peer = toy.manifest("s1", dataclasses.replace(toy.runs["s1"], seed=99))
    assert write_cards(toy.folder, records | {"peer": peer}) == written
    text = written[0].read_text(encoding="utf-8")
    assert "one seed per method" in text and "- seeds of the students: 0; of the teachers: 0" in text


def test_runs_without_a_manifest_and_studies_without_tables_are_named(toy, tmp_path):
    toy.write()
    records = toy.manifests()
    del records["s1"]
    with pytest.raises(InputError, match=r"1 of 3 runs of its tables have no usable manifest \(s1\): run the study"):
        write_cards(toy.folder, records)
    with pytest.raises(InputError, match=r"holds no \*_cases.csv: run a notebook of this study first"):
        write_cards(tmp_path / "none", records)
