import pandas as pd
import pytest
from analysis_tables import identity

from kdlib import InputError
from kdlib.analysis.convergence import convergence
from kdlib.analysis.sentences import convergence_sentence


def history(**runs):
    rows = [
        dict(run=f"{method}{number}", method=method, epoch=epoch, name="val_dice", value=value)
        for method, several in runs.items()
        for number, values in enumerate(several)
        for epoch, value in enumerate(values, start=1)
    ]
    return pd.DataFrame([*rows, dict(run="a0", method="a", epoch=1, name="loss", value=9.0)])


def test_dice_at_shares_of_the_training_by_hand():
    table = convergence(history(a=[[0.1, 0.5, 0.4, 0.6, 0.7, 0.6, 0.6, 0.8, 0.8, 0.805]])).iloc[0]
    assert table[["runs", "dice_25", "dice_50", "dice_100"]].tolist() == [1, 0.5, 0.7, 0.805]
    assert table["last_fifth"] == pytest.approx(0.005) and table["converged"]


def test_methods_are_means_over_their_runs_and_judged_each_alone():
    still_rising, flat = [0.1 * epoch for epoch in range(1, 6)], [0.5] * 5
    table = convergence(history(a=[still_rising, flat], b=[flat])).set_index("method")
    assert table.loc["a", "last_fifth"] == pytest.approx(0.05) and not table.loc["a", "converged"]
    assert table.loc["b", "converged"] and table["runs"].to_dict() == {"a": 2, "b": 1}


def test_methods_are_named_as_in_a_chapters_cases():
    """The history has the teacher, the cases do not: there S1 alone is "no distillation"."""
    rows = [identity(name) for name in ("S1 (50 %)", "KD(T1, S1)")]
    found = pd.DataFrame([*rows, identity("T1")]).assign(run=lambda table: table["method"], epoch=1)
    table = convergence(found.assign(name="val_dice", value=0.8), named=[pd.DataFrame(rows)])
    assert table["label"].tolist() == ["no distillation", "KD(T1, S1)", "T1"]


def test_what_a_teacher_taught_has_converged_when_the_teacher_has():
    rising, flat = [0.1 * epoch for epoch in range(1, 6)], [0.5] * 5
    about = pd.DataFrame(
        [["T1", "teacher", "T1", ""], ["T2", "teacher", "T2", ""], ["s", "baseline", "S1", ""],
         ["one", "distilled", "S1", "T1"], ["two", "distilled", "S1", "T2"], ["both", "control", "S1", "T2+T1"],
         ["silent", "control", "S1", "T1"]],
        columns=["method", "role", "model", "teacher"],
    )  # fmt: skip
    about["control"] = about["method"].map({"silent": "zero_weights"})
    found = history(**{name: [rising if name == "T1" else flat] for name in about["method"]} | {"a": [flat]})
    found = found.merge(about, how="left")
    table = convergence(found)
    tried = convergence(found.assign(recipe=found["method"]), ("recipe", "teacher")).set_index("recipe")  # of a sweep
    assert not tried.loc["T1", "converged"] and tried.loc["two", "converged"]
    converged = table.set_index("method")["converged"]
    assert converged.to_dict() == dict(T1=False, T2=True, s=True, one=False, two=True, both=False, silent=True, a=True)
    part = convergence(found.assign(fraction=found["method"].map({"T1": 0.25}).fillna(1.0))).set_index("method")
    assert not part.loc["T1", "converged"] and part.loc["one", "converged"], "it teaches nobody: it has not all labels"
    said = convergence_sentence(table)
    assert said.startswith("1 of 8 methods") and said.count("+0.100") == 1 and "such a teacher taught: " in said
    apart = pd.concat([found.assign(protocol="x"), found[found["method"] != "T1"].assign(protocol="y")])
    apart["run"] += apart["protocol"]
    converged = convergence(apart, ("protocol", "method")).set_index(["protocol", "method"])["converged"]
    assert not converged["x", "one"] and converged["y", "one"], "each protocol has its own teacher"


def test_a_history_without_validation_is_one_clear_line():
    with pytest.raises(InputError, match="without val_dice"):
        convergence(history(a=[[0.1]]).query("name == 'loss'"))
