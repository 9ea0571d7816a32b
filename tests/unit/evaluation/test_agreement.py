from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import CalibrationErrorMetric, calibration_binning
from small_training import Reader, boxes, painted
from torch import nn

from kdlib.analysis.tables import expected_calibration_error
from kdlib.config import InputError, Preprocessing
from kdlib.data.decathlon import index
from kdlib.data.slices import build
from kdlib.evaluation.agreement import agreement
from kdlib.evaluation.calibration import calibration
from kdlib.evaluation.cases import TOLERANCE, evaluate
from kdlib.evaluation.masks import predict_cases, surface_band
from kdlib.evaluation.similarity import cka, features_at, sample_features, scale_similarity
from kdlib.models import Output, build_model
from kdlib.training.device import computes_bf16

SPACING = (1.5, 2.0, 4.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two volumes with boxes as organs, stored in different axis orders; the second has no "far"."""
    return index(boxes(tmp_path_factory.mktemp("data") / "Task99_Boxes", SPACING, far=(1,)))


def wide(table) -> pd.DataFrame:
    return table.pivot(index=["case", "class"], columns="metric", values="value")


# ------------------------------------------------------------------------------------------------------------ fidelity


@pytest.mark.parametrize("target", ["near", "far", "all"])
def test_a_model_agrees_with_itself(dataset, target):
    bank = painted(dataset, target)
    model = Reader(len(bank.classes), shift=1)
    table = agreement(model, model, bank, dataset, bank.cases)
    assert list(table.columns) == ["case", "class", "metric", "value"]
    assert len(table) == len(bank.cases) * len(bank.classes) * 3
    found = wide(table)
    assert (found["agreement"] == 1).all()
    absent = [("box_2", "far")] if "far" in bank.classes else []
    assert set(found.index[found["band_agreement"].isna()]) == set(found.index[found["error_overlap"].isna()])
    assert set(found.index[found["error_overlap"].isna()]) == set(absent)
    assert (found.drop(index=absent)[["band_agreement", "error_overlap"]] == 1).all(axis=None)


def test_agreement_by_hand(dataset):
    # the teacher is right; the student lies one row (2 mm along the file's y) lower: 14 of the box's 15 rows are shared
    bank = painted(dataset, "near")
    teacher, student = Reader(1), Reader(1, shift=1)
    found = wide(agreement(student, teacher, bank, dataset, bank.cases))
    assert found["agreement"].tolist() == pytest.approx([14 / 15] * 2)
    assert found["error_overlap"].tolist() == [0.0, 0.0]
    # both faces that move hold 8 x 6 voxels; the band is counted voxel by voxel below
    truth = np.zeros((26, 24, 14), bool)
    truth[4:12, 5:20, 3:9] = True
    assert found["band_agreement"].tolist() == pytest.approx([1 - 2 * 48 / slow_band(truth, SPACING).sum()] * 2)
    # with the truth in the teacher's place, agreement is the Dice of evaluation
    dice = evaluate(student, bank, dataset, bank.cases)[0].query("metric == 'dice'")["value"]
    assert found["agreement"].tolist() == pytest.approx(dice.tolist())


def test_errors_made_alike_and_apart(dataset):
    bank = painted(dataset, "near")
    alike = wide(agreement(Reader(1, 2), Reader(1, 1), bank, dataset, ["box_2"]))
    # wrong are 2 x 2 rows and 2 x 1 rows, of which 2 are the same
    assert alike["error_overlap"].item() == pytest.approx(2 * 2 / 6)
    apart = wide(agreement(Reader(1, 1), Reader(1, -1), bank, dataset, ["box_2"]))
    assert apart["error_overlap"].item() == 0 and apart["agreement"].item() == pytest.approx(13 / 15)
    assert list(apart.index) == [("box_2", "near")]


def slow_band(truth, spacing, width=2.0):
    """Every voxel against every voxel of the surface."""
    padded = np.pad(truth, 1)
    inner = truth.copy()
    for axis in range(3):
        for step in (1, -1):
            inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    surface = np.argwhere(truth & ~inner) * spacing
    found = np.zeros_like(truth)
    for place in np.argwhere(np.ones_like(truth)):
        found[tuple(place)] = ((surface - place * spacing) ** 2).sum(1).min() <= width**2 + 1e-9
    return found


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1.0, 1.0, 1.0), (0.7, 0.8, 2.5), (3.0, 1.0, 5.0)]))
def test_surface_band_is_its_definition(seed, spacing):
    generator = np.random.default_rng(seed)
    truth = generator.random(generator.integers(1, 9, 3)) < generator.choice([0.05, 0.9])
    band, box = surface_band(truth, spacing, TOLERANCE)
    found = np.zeros_like(truth)
    found[box] = band
    assert np.array_equal(found, slow_band(truth, spacing) if truth.any() else found * False)


def test_unknown_case_is_named(dataset):
    with pytest.raises(InputError, match="box_7"):
        agreement(Reader(1), Reader(1), painted(dataset, "near"), dataset, ["box_7"])


# ----------------------------------------------------------------------------------------------------------------- CKA


def features(n, channels, seed):
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n=60, p=7, q=5, seed=0):
    x = features(n, p, seed)
    return x, x[:, :q] @ features(q, q, seed + 1) + 0.5 * features(n, q, seed + 2) + 3


def rotation(channels, seed=9):
    return torch.linalg.qr(features(channels, channels, seed))[0]


@pytest.mark.parametrize("n, p, q", [(60, 7, 5), (10, 40, 30), (5, 1, 1)])
def test_cka_is_the_normalised_alignment_of_gram_matrices(n, p, q):
    x, y = features(n, p, 0), features(n, q, 1) ** 2
    # HSIC of the centred Gram matrices (Kornblith 2019, eq. 2 to 4)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    k, l = (centre @ z @ z.T @ centre for z in (x, y))  # noqa: E741
    assert cka(x, y) == pytest.approx(float((k * l).sum() / (k.norm() * l.norm())), rel=1e-9)


def test_cka_of_one_channel_is_the_squared_correlation():
    x, y = (z[:, :1] for z in related())
    assert cka(x, y) == pytest.approx(np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2)


def test_cka_invariances():
    x, y = related()
    value = cka(x, y)
    assert 0.1 < value < 0.95 and cka(y, x) == pytest.approx(value)
    assert cka(x, x) == pytest.approx(1) and cka(x, -3 * x @ rotation(7) + 5) == pytest.approx(1)
    assert cka(x @ rotation(7), 0.01 * y @ rotation(5) - 8) == pytest.approx(value)
    assert cka(x @ torch.diag(torch.arange(1.0, 8).double()), y) != pytest.approx(value, rel=1e-3)  # not every linear
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert cka(x[order], y[order]) == pytest.approx(value) and cka(x[order], y) < value


def test_cka_of_half_precision_is_computed_in_double():
    x, y = ((z * 1e3).half() for z in related())  # squares would overflow
    assert cka(x, y) == pytest.approx(cka(x.double(), y.double()), rel=1e-12)


def test_cka_of_constant_and_ill_shaped_features():
    x, y = related()
    assert np.isnan(cka(x, torch.ones(60, 3))) and np.isnan(cka(x[:1], y[:1]))
    for bad in (y[:-1], y[:, 0], y[None]):
        with pytest.raises(InputError, match="at the same ones"):
            cka(x, bad)


def test_unrelated_features_of_many_channels_are_as_alike_as_documented():
    n, p, q = 200, 100, 50
    assert cka(features(n, p, 0), features(n, q, 1)) == pytest.approx(np.sqrt(p * q / ((n + p) * (n + q))), rel=0.05)


@pytest.fixture(scope="module")
def noise(dataset):
    bank = build(dataset, dataset.classes("near"), Preprocessing(32))
    return dataclasses.replace(
        bank,
        images=torch.randint(256, bank.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    )


def models(*names):
    torch.manual_seed(0)
    return [build_model(name, width=0.1).train() for name in names]


@pytest.mark.parametrize("teacher", ["T1", "T2"])
def test_every_pair_of_scales_is_compared(noise, teacher):
    student, teacher = models("S1", teacher)
    table = scale_similarity(student, teacher, noise, positions=100)
    assert list(table.columns) == ["scale_student", "scale_teacher", "value"]
    assert table["scale_student"].unique().tolist() == list(student.scales)
    assert len(table) == len(student.scales) * len(teacher.scales) and table["value"].between(0, 1).all()
    assert student.training and teacher.training and not student.bottleneck._forward_hooks
    pd.testing.assert_frame_equal(table, scale_similarity(student, teacher, noise, positions=100))
    assert not table.equals(scale_similarity(student, teacher, noise, positions=100, seed=1))


def test_a_model_is_like_itself_scale_by_scale(noise):
    (student,) = models("S1")
    found = scale_similarity(student, student, noise, 50).pivot(
        index="scale_student", columns="scale_teacher", values="value"
    )
    assert np.diag(found.loc[list(student.scales), list(student.scales)]) == pytest.approx(np.ones(6))
    crossed = found.loc["encoder1", "bottleneck"]
    assert crossed == pytest.approx(found.loc["bottleneck", "encoder1"]) and crossed < 0.99


@pytest.mark.parametrize("positions", [2, 10, 28, 29, 100])  # fewer and more than the 28 slices
def test_as_many_positions_as_asked_for(noise, positions, monkeypatch):
    seen = []
    monkeypatch.setattr("kdlib.evaluation.similarity.cka", lambda x, y: seen.append((len(x), len(y))) or 0.0)
    scale_similarity(*models("S1", "S1"), noise, positions)
    assert set(seen) == {(positions, positions)}


class Ramp(nn.Module):
    """Two feature maps, of full and of a quarter resolution, that both hold the images' own smooth ramp."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 1, 1), nn.AvgPool2d(4)
        self.scales = {"fine": "fine", "coarse": "coarse"}
        nn.init.constant_(self.fine.weight, 1.0)

    def forward(self, x, reconstruct=True):
        return Output(self.coarse(self.fine(x)), None)


def test_scales_of_any_resolution_are_read_at_the_same_places(noise):
    # rows count four times as much as columns; a ramp averaged over 4 x 4 pixels is the same ramp but for the border
    ramp = torch.arange(32).add(4 * torch.arange(32)[:, None]).to(torch.uint8).expand_as(noise.images)
    points = torch.rand(4, 50, 2, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    model = Ramp()
    found = features_at(model, dataclasses.replace(noise, images=ramp), torch.arange(4), points)
    column, row = ((points.flatten(0, 1) + 1) * 16 - 0.5).unbind(1)  # in pixels, whose centres are whole
    expected = ((column + 4 * row) * 3 / 255 + model.fine.bias)[:, None].detach()
    near = {"atol": 0.03, "rtol": 0} if computes_bf16(torch.device("cpu")) else {"atol": 1e-5, "rtol": 0}
    for name in ("fine", "coarse"):
        torch.testing.assert_close(found[name], expected, **near)


def test_slices_may_come_in_any_batches(noise):
    (model,) = models("S1")
    index, points = torch.arange(27, -1, -3), torch.rand(10, 3, 2) * 2 - 1
    near = {"atol": 0.05, "rtol": 0} if computes_bf16(torch.device("cpu")) else {}
    whole, parts = (features_at(model, noise, index, points, batch) for batch in (32, 3))
    for name, found in whole.items():
        assert len(found) == 30
        torch.testing.assert_close(found, parts[name], **near)


def test_too_few_positions(noise):
    with pytest.raises(InputError, match="1 positions"):
        scale_similarity(*models("S1", "S1"), noise, 1)


@pytest.mark.parametrize("positions", [30, 10**6])
def test_the_same_pixels_of_every_class_are_sampled_in_every_model(dataset, positions):
    bank = painted(dataset, "all")
    student, teacher = models("S1", "T1")
    found = sample_features({"student": student, "teacher": teacher}, bank, positions=positions)
    assert list(found) == ["case", "class", "student", "teacher"] and set(found["case"]) == set(bank.cases)
    names, counts = np.unique(found["class"], return_counts=True)
    shown = bank.labels[(bank.labels > 0).flatten(1).any(1)]
    whole = {"background": (shown == 0).sum(), "near": (shown == 1).sum(), "far": (shown == 2).sum()}
    assert dict(zip(names, counts, strict=True)) == {name: min(positions // 3, n) for name, n in whole.items()}
    assert len(found["case"]) == len(found["student"]) == len(found["teacher"]) == counts.sum()
    again = sample_features({"student": student}, bank, positions=positions)
    np.testing.assert_array_equal(again["student"], found["student"])


def test_sampled_features_are_those_of_the_pixel(dataset):
    """With the ramp's features the pixel each was read at can be told from its value."""
    bank = painted(dataset, "near")
    places = torch.arange(32 * 32).reshape(32, 32)
    model = Ramp()
    model.scales = {"decoder1": "fine"}
    ramp = (places % 251).to(torch.uint8).expand_as(bank.images)
    found = sample_features({"ramp": model}, dataclasses.replace(bank, images=ramp), positions=40, slices=100)
    value = (found["ramp"][:, 0] - model.fine.bias.item()) * 255 / 3
    near = 2 if computes_bf16(torch.device("cpu")) else 0.01
    for case, name, seen in zip(found["case"], found["class"], value, strict=True):
        slices = bank.labels[bank.case_index == bank.cases.index(case)]
        there = slices[:, ((places % 251) - seen).abs() < near]
        assert (there == (name == "near")).any()


def test_features_of_a_bank_without_any_class_cannot_be_sampled(dataset):
    bank = painted(dataset, "near")
    with pytest.raises(InputError, match="no slice or patch of box_1, box_2 shows near"):
        sample_features({}, dataclasses.replace(bank, labels=bank.labels * 0))


# --------------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("target", ["near", "all"])
def test_calibration_is_monais(dataset, target):
    """Bins and error of MONAI, in the box that a loop finds."""
    bank = build(dataset, dataset.classes(target), Preprocessing(32))
    images = torch.randint(256, bank.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bank, model = dataclasses.replace(bank, images=images), Reader(len(bank.classes), gain=8.0)
    table = calibration(model, bank)
    assert list(table.columns) == ["case", "class", "bin", "confidence", "accuracy", "count"]
    assert len(table) == len(bank.cases) * len(bank.classes) * 15
    errors = expected_calibration_error(table).set_index(["case", "class"])["value"]
    scores = predict_cases(model, bank)
    for number, case in enumerate(bank.cases):
        for value, name in enumerate(bank.classes, start=1):
            found = table[(table["case"] == case) & (table["class"] == name)]
            truth = bank.labels[bank.case_index == number] == value
            if not truth.any():
                assert (found["count"] == 0).all() and found["accuracy"].isna().all() and np.isnan(errors[case, name])
                continue
            box = []
            for side in np.argwhere(truth.numpy()).T:
                margin = max(1, (side.max() - side.min() + 1) // 4)
                box.append(slice(max(side.min() - margin, 0), side.max() + 1 + margin))
            said = scores[case][value if len(bank.classes) > 1 else 0][tuple(box)]
            pair = [part.float().flatten()[None, None] for part in (said, truth[tuple(box)])]
            confidence, accuracy, count = (part[0, 0].double().numpy() for part in calibration_binning(*pair, 15))
            assert found["count"].tolist() == count.tolist() and (count > 0).sum() > 5
            assert found["confidence"].to_numpy() == pytest.approx(confidence, nan_ok=True, rel=1e-4)
            assert found["accuracy"].to_numpy() == pytest.approx(accuracy, nan_ok=True, rel=1e-4)
            oracle = CalibrationErrorMetric(num_bins=15, calibration_reduction="expected")
            oracle(*pair)
            assert errors[case, name] == pytest.approx(float(oracle.aggregate()), rel=1e-4)


def test_calibration_by_hand(dataset):
    # sure and one row off: every pixel has probability 0 or 1; of 15 rows said, 1 is wrong, and 1 true row is missed
    bank = painted(dataset, "near")
    table = calibration(Reader(1, shift=1), bank.select(["box_1"]))
    top, bottom = table.iloc[14], table.iloc[0]
    assert top["count"] == 8 * 15 * 6 and top["accuracy"] == pytest.approx(14 / 15)
    assert (top["confidence"], bottom["confidence"]) == pytest.approx((1.0, 0.0), abs=1e-6)
    # the box of 6 slices, 15 rows and 8 columns grows by 1, 3 and 2 on every side
    box = (6 + 2) * (15 + 6) * (8 + 4)
    assert bottom["count"] == box - 720 and bottom["accuracy"] == pytest.approx(48 / (box - 720))
    assert table["count"].iloc[1:14].eq(0).all()
    error = expected_calibration_error(table)
    assert error.columns.tolist() == ["case", "class", "metric", "value"] and error["metric"].tolist() == ["ece"]
    assert error["value"].item() == pytest.approx((48 + 48) / box)


def test_a_model_that_gives_the_frequency_is_calibrated():
    generator = np.random.default_rng(0)
    confidence, count = generator.random(15), generator.integers(1, 100, 15)
    table = pd.DataFrame(dict(bin=range(15), confidence=confidence, accuracy=confidence, count=count))
    assert expected_calibration_error(table.assign(case="a", **{"class": "c"}))["value"].item() == 0


def test_errors_of_arms_stay_apart(dataset):
    bank = painted(dataset, "near")
    arms = {"KD": Reader(1), "S1": Reader(1, shift=2)}
    table = pd.concat([calibration(model, bank).assign(arm=arm) for arm, model in arms.items()])
    found = expected_calibration_error(table)
    assert found.groupby("arm")["value"].agg(["size", "max"])["size"].tolist() == [2, 2]
    assert found.query("arm == 'KD'")["value"].max() < 1e-6 < found.query("arm == 'S1'")["value"].min()


def test_unusable_calibration_is_refused(dataset):
    with pytest.raises(InputError, match="without class, count"):
        expected_calibration_error(pd.DataFrame(columns=["case", "bin", "confidence", "accuracy"]))
