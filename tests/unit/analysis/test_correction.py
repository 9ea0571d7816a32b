from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from kdlib.analysis.answer import correction_markdown
from kdlib.analysis.sentences import correction_sentence, gains_sentence
from kdlib.analysis.statistics import compare, convergence, gains, overlap_weights, step_changes, withhold_stages
from kdlib.config import InputError


def stages(values: dict[str, list[float]], volumes: list[float] | None = None) -> pd.DataFrame:
    """A tidy table of one method: stage -> Dice of each patient, whose predictions have the volume of the truth."""
    rows = []
    for stage, dice in values.items():
        for number, value in enumerate(dice):
            row = dict(run=stage, method="KD", protocol=stage, fold=0, seed=0, patient=f"p{number}", case=f"c{number}")
            truth = (volumes or [1.0] * len(dice))[number]
            metrics = {"dice": value, "truth_volume": truth, "volume_error": 0.0}
            rows += [row | {"class": "spleen", "metric": name, "value": found} for name, found in metrics.items()]
    return pd.DataFrame(rows)


def test_steps_adds_up_from_stage_to_stage():
    dice = {"thesis": [0.5] * 8, "a": [0.6] * 8, "b": [0.57, 0.53] * 4}
    found = step_changes(stages(dice), list(dice), [])
    assert list(found["step"]) == ["thesis", "a", "b", "corrected"] and set(found["n"]) == {8}
    assert found["dice"].tolist() == pytest.approx([0.5, 0.6, 0.55, 0.55])
    assert found["difference"].tolist()[1:] == pytest.approx([0.1, -0.05, 0.05])
    assert found["verdict"].tolist()[1:] == ["better", "worse", "better"]
    assert found.loc[1, ["low", "high"]].tolist() == pytest.approx([0.1, 0.1])


def test_two_stages_are_said_as_one_change():
    found = step_changes(stages({"thesis": [0.5, 0.6] * 4, "b": [0.7, 0.8] * 4}), ["thesis", "b"], [])
    said = correction_sentence(found)
    assert said == "From the published to the corrected protocol Dice changes by +0.200 [+0.200, +0.200] (better)."
    assert found["step"].tolist() == ["thesis", "b"] and found["before"].tolist() == ["", "thesis"]
    rising = pd.DataFrame([dict(protocol="b", method="KD", converged=False)])
    gained = pd.DataFrame([dict(stage=name, reference="S1", verdict="better") for name in ("thesis", "b")])
    held = withhold_stages(gained, found, rising, "KD")
    assert [table["verdict"].tolist()[1:] for table in held] == [["not converged"]] * 2


def test_single_faults_are_each_compared_with_the_corrected_protocol():
    dice = {"corrected": [0.8] * 8, "byte image": [0.7] * 8, "pooled dice": [0.82, 0.78] * 4}
    found = step_changes(stages(dice), list(dice), [])
    assert list(found["step"]) == list(dice) and found["before"].tolist() == ["", "corrected", "corrected"]
    assert found["difference"].tolist()[1:] == pytest.approx([-0.1, 0.0])
    assert found["verdict"].tolist()[1:] == ["worse", "inconclusive"]
    said = correction_sentence(found)
    assert "the fault that changes Dice most changes it by \N{MINUS SIGN}0.100" in said and "by: byte image" in said
    assert said.endswith("1 of 2 faults is decided (byte image).")
    worth = pd.DataFrame([
        dict(stage=stage, label_b="alone", difference=value, low=value, high=value, verdict="better", n=8)
        for stage, value in {"corrected": 0.0, "byte image": 0.01, "pooled dice": 0.03}.items()
    ])  # fmt: skip
    said = gains_sentence(worth)
    assert "under the corrected protocol by +0.000" in said and "put back, pooled dice, by +0.030" in said


def test_single_faults_that_have_not_converged_get_no_verdict():
    dice = {"corrected": [0.8] * 8, "byte image": [0.7] * 8}
    changes = step_changes(stages(dice), list(dice), [])
    rising = pd.DataFrame([dict(protocol="byte image", method="KD", converged=False)])
    worth = pd.DataFrame([dict(stage=stage, reference="alone", verdict="better") for stage in dice])
    worth, changes = withhold_stages(worth, changes, rising, "KD")
    assert worth["verdict"].tolist() == ["better", "not converged"] and changes["verdict"].iloc[1] == "not converged"


def test_the_page_has_the_gain_over_zero_weights_by_pooled_dice_and_by_volumes():
    # pooled, the large second patient decides: 2 * (9 + 10) / 220 against 2 * (9 + 40) / 220
    worth = {"distilled": [0.9, 0.1], "control": [0.9, 0.4]}
    parts = [stages({"thesis": dice, "corrected": dice}, [10.0, 100.0]).assign(method=name)
             for name, dice in worth.items()]  # fmt: skip
    table = pd.concat(parts).assign(control="zero_weights")
    names = ["thesis", "corrected"]
    pooled, by_volume = (gains(table, "distilled", ["control"], names, of) for of in (["thesis"], []))
    assert pooled["difference"].tolist() == pytest.approx([-30 / 110, -0.15])
    labelled = [of.assign(label_b="zero-weight control") for of in (pooled, by_volume)]
    page = correction_markdown(step_changes(parts[0], names, ["thesis"]), *labelled)
    row = next(line for line in page.splitlines() if line.startswith("| thesis"))
    assert "\N{MINUS SIGN}0.273 [" in row and "\N{MINUS SIGN}0.150 [" in row
    assert "gain over the zero-weight control here, by Dice of volumes" in page
    assert pooled["low"].min() >= -1 and pooled["high"].max() <= 1, "no interval beyond what a difference can be"


def test_pooled_dice_is_that_of_all_voxels_together():
    # |A| = |B| = 30 with 27 shared, and |A| = |B| = 10 with 1 shared: 2 * 28 / 80
    table = stages({"thesis": [0.9, 0.1]}, [30.0, 10.0])
    found = overlap_weights(table, pooled=True)
    assert found["weight"].tolist() == [60, 20] and found["dice"].tolist() == pytest.approx([0.9, 0.1])
    both = step_changes(stages({"thesis": [0.9, 0.1], "b": [0.9, 0.1]}, [30.0, 10.0]), ["thesis", "b"], ["thesis"])
    assert both["dice"].tolist() == pytest.approx([0.7, 0.5])


def test_pooled_dice_adds_up_the_cases_of_a_patient():
    table = stages({"thesis": [1.0, 1.0, 0.0]})
    table["patient"] = table["patient"].replace({"p1": "p0"})  # two equal volumes of one patient, one of another
    found = step_changes(pd.concat([table, table.assign(protocol="b")]), ["thesis", "b"], ["thesis", "b"])
    assert found["dice"].tolist() == pytest.approx([2 / 3] * 2)


def test_a_patient_without_target_or_prediction_is_right_and_weighs_nothing():
    dice = {"thesis": [0.5, 1.0], "b": [0.5, 1.0]}
    found = step_changes(stages(dice, [10.0, 0.0]), list(dice), ["thesis"])
    assert found["dice"].tolist() == pytest.approx([0.5, 0.75])


def test_intervals_are_of_trainings_too_where_there_are_several():
    """By the Dice of volumes as `compare` has them; pooled, with equal volumes, the same."""
    generator = np.random.default_rng(0)
    parts = []
    for seed in range(3):
        alone = generator.uniform(0.6, 0.8, 24)
        taught = alone + 0.02 + 0.03 * (seed - 1) + generator.normal(0, 0.01, 24)
        for method, dice in (("alone", alone), ("KD", taught)):
            parts.append(stages({"thesis": dice.tolist()}).assign(method=method, seed=seed, run=f"{method}{seed}"))
    table = pd.concat(parts, ignore_index=True)
    ours = gains(table, "KD", ["alone"], ["thesis"], []).iloc[0]
    theirs = compare(table.assign(model="S1", teacher="", fraction=1.0, role="baseline"), [("KD", "alone")]).iloc[0]
    for name in ("difference", "low", "high"):
        assert ours[name] == pytest.approx(theirs[name], abs=0.004), name
    pooled = gains(table, "KD", ["alone"], ["thesis"], ["thesis"]).iloc[0]
    assert pooled[["low", "high"]].tolist() == pytest.approx(ours[["low", "high"]].tolist())
    mean = table.assign(value=table.groupby(["method", "patient", "metric"])["value"].transform("mean"))
    narrow = gains(mean[mean["seed"] == 0], "KD", ["alone"], ["thesis"], []).iloc[0]
    assert ours["high"] - ours["low"] > 2 * (narrow["high"] - narrow["low"]), "patients alone differ less"


def test_swaps_by_hand():
    # three patients, two steps: all eight ways to swap the patients' values, in both steps at once
    dice = {"thesis": [0.1, 0.2, 0.3], "a": [0.3, 0.3, 0.7], "b": [0.35, 0.2, 0.8]}
    found = step_changes(stages(dice), list(dice), []).set_index("step")["p_adjusted"]
    values = np.array(list(dice.values()))
    differences = np.array([values[1] - values[0], values[2] - values[1], values[2] - values[0]])
    signs = np.array(list(itertools.product([1, -1], repeat=3)))
    sizes = abs(differences @ signs.T) / np.sqrt((differences**2).sum(axis=1))[:, None]  # of sums of random signs
    expected = (sizes.max(axis=0) >= sizes[:, :1] - 1e-9).mean(axis=1)
    assert found.tolist()[1:] == pytest.approx(expected.tolist()) and np.isnan(found["thesis"])


def test_six_patients_can_decide_a_correction_of_many_steps():
    base = np.linspace(0.2, 0.4, 6)
    dice = {f"step {step}": (base + 0.05 * step + 0.001 * step * np.arange(6)).tolist() for step in range(9)}
    assert set(step_changes(stages(dice), list(dice), [])["verdict"][1:]) == {"better"}  # the least p is 2 / 2^6


def test_stages_of_different_patients_are_named_in_gains():
    table = pd.concat([stages({"thesis": [0.5, 0.6], "b": [0.5]})] * 2).reset_index(drop=True)
    table["method"] = ["KD"] * (len(table) // 2) + ["alone"] * (len(table) // 2)
    with pytest.raises(InputError, match="patients p1 are not in both"):
        gains(table, "KD", ["alone"], ["thesis", "b"], [])


def test_few_patients_are_never_decided_by_a_bootstrap():
    dice = {"thesis": [0.5] * 5, "a": [0.9] * 5}
    assert step_changes(stages(dice), list(dice), [])["verdict"].tolist()[1:] == ["inconclusive"]


def test_steps_names_what_is_missing():
    with pytest.raises(InputError, match="no stage 'b' in the table: it has thesis"):
        step_changes(stages({"thesis": [0.5]}), ["thesis", "b"], [])
    with pytest.raises(InputError, match="patients p1 are not in both"):
        step_changes(stages({"thesis": [0.5, 0.6], "b": [0.5]}), ["thesis", "b"], [])
    two = pd.concat([stages({"thesis": [0.5]}), stages({"thesis": [0.5]}).assign(**{"class": "liver"})])
    with pytest.raises(InputError, match="several classes; filter the table to one"):
        overlap_weights(two, pooled=True)


def test_gains_compare_methods_within_a_stage():
    dice = {"thesis": [0.5, 0.6] * 4, "b": [0.7, 0.8] * 4}
    lower = {stage: [value - 0.1 for value in values] for stage, values in dice.items()}
    table = pd.concat([stages(dice), stages(lower).assign(method="alone")])
    found = gains(table, "KD", ["alone"], list(dice), [])
    assert found["difference"].tolist() == pytest.approx([0.1, 0.1]) and set(found["verdict"]) == {"better"}
    assert found["dice"].tolist() == pytest.approx([0.55, 0.75])


def test_no_verdict_on_a_stage_that_has_not_converged():
    """Stages share a run where they are one training; what rises in one stage is no matter in another."""
    dice = {"thesis": [0.5, 0.6] * 4, "b": [0.7, 0.8] * 4, "c": [0.9, 0.95] * 4}
    lower = {stage: [value - 0.1 for value in values] for stage, values in dice.items()}
    table = pd.concat([stages(dice), stages(lower).assign(method="alone")])
    names = list(dice)
    last = {("thesis", "KD"): 0.0, ("b", "KD"): 0.0, ("c", "KD"): 0.1}
    last |= {("thesis", "alone"): 0.1, ("b", "alone"): 0.0, ("c", "alone"): 0.0}
    history = pd.DataFrame([
        dict(run="shared" if method == "alone" and stage != "thesis" else f"{stage} {method}", protocol=stage,
             method=method, epoch=epoch, name="val_dice", value=value)
        for (stage, method), gain in last.items() for epoch, value in ((8, 0.5), (10, 0.5 + gain))
    ])  # fmt: skip
    progress = convergence(history, ("protocol", "method"))
    assert len(progress) == 6 and list(progress["converged"]) == [True, True, False, False, True, True]
    judged, changed = withhold_stages(
        gains(table, "KD", ["alone"], names, []), step_changes(stages(dice), names, []), progress, "KD"
    )
    assert list(judged["verdict"]) == ["not converged", "better", "not converged"]
    assert list(changed["verdict"][1:]) == ["better", "not converged", "not converged"] and pd.isna(
        changed["verdict"][0]
    )
