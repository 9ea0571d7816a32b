from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
    compute_surface_dice,
)
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from small_training import Reader, boxes, painted

from kdlib.config import LOGIT_CUT, InputError, Preprocessing
from kdlib.data.decathlon import index
from kdlib.data.slices import build
from kdlib.evaluation.cases import case_metrics, evaluate
from kdlib.evaluation.masks import predict_cases
from kdlib.metrics import METRICS
from kdlib.models import build_model
from kdlib.training.device import autocast, computes_bf16
from kdlib.training.validation import volume_dice


def values(prediction, truth, spacing=(1.0, 1.0, 1.0)) -> dict[str, float]:
    table = case_metrics(np.asarray(prediction, int), np.asarray(truth, int), ["organ"], spacing)
    return dict(zip(table["metric"], table["value"], strict=True))


def box(shape, *sides):
    mask = np.zeros(shape, int)
    mask[tuple(slice(low, high) for low, high in sides)] = 1
    return mask


# ------------------------------------------------------------------------------------------------ hand-computed cases


def test_shifted_cube_by_hand():
    # 4 x 4 x 4 voxels moved by one voxel of 3 mm: 48 of 64 voxels are shared
    truth = box((10, 10, 10), (2, 6), (2, 6), (2, 6))
    found = values(np.roll(truth, 1, axis=2), truth, (1.0, 2.0, 3.0))
    assert found["dice"] == pytest.approx(48 / 64)
    assert found["iou"] == pytest.approx(48 / 80)
    assert found["recall"] == found["precision"] == pytest.approx(48 / 64)
    assert found["truth_volume"] == pytest.approx(64 * 6 / 1000)
    assert found["volume_error"] == 0
    # each shell has 56 voxels. A voxel of the far face (16) is 3 mm from the other shell; of the next layer's inner
    # voxels (4) inside the other cube, the nearest shell voxel is 1 mm away; the rest lie on both shells
    assert found["hd95"] == pytest.approx(3.0)
    assert found["assd"] == pytest.approx((16 * 3 + 4 * 1) / 56)
    assert found["nsd"] == pytest.approx((36 + 4) / 56)


@pytest.mark.parametrize("axis, apart", [(0, 1.5), (1, 2.0), (2, 5.0)])
def test_shift_of_a_plane_is_its_distance_in_mm(axis, apart):
    truth = np.zeros((7, 8, 9), int)
    truth.swapaxes(0, axis)[2] = 1
    found = values(np.roll(truth, 1, axis=axis), truth, (1.5, 2.0, 5.0))
    assert found["hd95"] == found["assd"] == pytest.approx(apart)
    assert found["nsd"] == (1.0 if apart <= 2 else 0.0)  # 2.0 mm is still within the tolerance
    assert found["dice"] == 0


def test_single_voxels():
    prediction, truth = box((9, 9, 9), (1, 2), (1, 2), (1, 2)), box((9, 9, 9), (4, 5), (3, 4), (2, 3))
    found = values(prediction, truth, (1.0, 2.0, 5.0))
    assert found["hd95"] == found["assd"] == pytest.approx(np.sqrt(3**2 + 4**2 + 5**2))
    assert found["recall"] == found["precision"] == found["nsd"] == 0


def test_hd95_is_the_larger_of_both_directions():
    # every true voxel is met exactly; 2 of 22 predicted ones lie 10 mm away, so the 95th percentile from there is 10
    truth = box((40, 5, 5), (0, 20), (2, 3), (2, 3))
    prediction = truth + box((40, 5, 5), (29, 30), (2, 3), (2, 3)) + box((40, 5, 5), (19, 20), (2, 3), (4, 5))
    distances = [0.0] * 20 + [2.0, 10.0]
    found = values(prediction, truth)
    assert found["hd95"] == pytest.approx(np.percentile(distances, 95)) and found["hd95"] > 1
    assert values(truth, prediction)["hd95"] == pytest.approx(found["hd95"])
    assert found["assd"] == pytest.approx(12 / 42)
    assert found["volume_error"] == pytest.approx(2 / 1000)
    assert values(truth, prediction)["volume_error"] == pytest.approx(-2 / 1000)


def test_recall_and_precision_are_not_swapped():
    truth, prediction = box((8, 8, 8), (0, 4), (0, 1), (0, 1)), box((8, 8, 8), (0, 2), (0, 1), (0, 1))
    found = values(prediction, truth)
    assert (found["recall"], found["precision"]) == (0.5, 1.0)


# ---------------------------------------------------------------------------------------------------------- emptiness


def test_what_empty_means():
    mask, empty, spacing = box((10, 20, 30), (2, 4), (2, 4), (2, 4)), np.zeros((10, 20, 30), int), (1.0, 2.0, 0.5)
    diagonal = np.sqrt(10**2 + 40**2 + 15**2)
    both = values(empty, empty, spacing)
    assert all(both[name] == 1 for name in ("dice", "iou", "recall", "precision", "nsd"))
    assert both["hd95"] == both["assd"] == both["volume_error"] == both["truth_volume"] == 0
    truth_only, prediction_only = values(mask, empty, spacing), values(empty, mask, spacing)
    for found in (truth_only, prediction_only):
        assert found["dice"] == found["iou"] == found["nsd"] == 0
        assert found["hd95"] == found["assd"] == pytest.approx(diagonal)
    assert np.isnan(truth_only["recall"]) and truth_only["precision"] == 0
    assert np.isnan(prediction_only["precision"]) and prediction_only["recall"] == 0
    assert truth_only["volume_error"] == -prediction_only["volume_error"] == pytest.approx(8 / 1000)


def test_classes_are_measured_apart():
    truth, prediction = np.zeros((8, 8, 8), int), np.zeros((8, 8, 8), int)
    truth[0:2], truth[4:6] = 1, 2
    prediction[0:2], prediction[5:7] = 1, 2
    table = case_metrics(prediction, truth, ["head", "tail"], (2.0, 1.0, 1.0)).set_index(["class", "metric"])["value"]
    assert list(table["head"].index) == list(METRICS)
    assert table["head", "dice"] == 1 and table["tail", "dice"] == 0.5
    assert table["head", "hd95"] == 0 and table["tail", "hd95"] == 2


def test_unusable_arrays_are_refused():
    with pytest.raises(InputError, match="same grid"):
        case_metrics(np.zeros((4, 4, 4), int), np.zeros((4, 4, 5), int), ["organ"], (1, 1, 1))
    with pytest.raises(InputError, match="truth has labels 0 to 2"):
        case_metrics(np.zeros((4, 4, 4), int), np.full((4, 4, 4), 2) * box((4, 4, 4), (1, 2)), ["organ"], (1, 1, 1))


# ------------------------------------------------------------------------------------------------- oracles, properties


@st.composite
def mask_pairs(draw):
    """Blobs, partly overlapping, that may touch the border or be empty."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = generator.integers(3, 9, 3)
    density = draw(st.sampled_from([0.0, 0.02, 0.3, 0.9]))
    return [generator.random(shape) < density for _ in range(2)]


def surface(mask, spacing):
    return np.argwhere(mask & ~binary_erosion(mask)) * np.array(spacing)


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges")  # MONAI 1.6 on its own argument
@settings(deadline=None, max_examples=60)
@given(mask_pairs(), st.tuples(*[st.floats(0.3, 6.0)] * 3))
def test_metrics_against_all_pairs_in_float64_and_monai(pair, spacing):
    prediction, truth = pair
    found = values(prediction, truth, spacing)
    both = np.count_nonzero(prediction & truth)
    if not prediction.any() and not truth.any():
        return
    assert found["dice"] == pytest.approx(2 * both / (prediction.sum() + truth.sum()))
    assert found["iou"] == pytest.approx(both / np.count_nonzero(prediction | truth))
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in pair]
    if truth.any():
        assert found["dice"] == pytest.approx(float(compute_dice(*tensors)))
        assert found["iou"] == pytest.approx(float(compute_iou(*tensors)))
    if not prediction.any() or not truth.any():
        return
    far = cdist(surface(prediction, spacing), surface(truth, spacing))
    there, back = far.min(1), far.min(0)
    assert found["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    assert found["assd"] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)
    # the whole volume through MONAI's own functions: the crop changes nothing
    how = dict(include_background=True, spacing=list(spacing))
    oracle = {
        "hd95": compute_hausdorff_distance(*tensors, percentile=95, **how),
        "assd": compute_average_surface_distance(*tensors, symmetric=True, **how),
        "nsd": compute_surface_dice(*tensors, [2.0], **how),
    }
    assert {name: found[name] for name in oracle} == pytest.approx({k: float(v) for k, v in oracle.items()}, rel=1e-5)


@settings(deadline=None, max_examples=60)
@given(mask_pairs(), st.integers(1, 4))
def test_properties(pair, margin):
    prediction, truth = pair
    found, swapped = values(prediction, truth), values(truth, prediction)
    assert found["dice"] == pytest.approx(2 * found["iou"] / (1 + found["iou"]))
    for name in ("dice", "iou", "hd95", "assd", "nsd"):
        assert found[name] == pytest.approx(swapped[name])
    assert found["recall"] == pytest.approx(swapped["precision"], nan_ok=True)
    assert found["volume_error"] == pytest.approx(-swapped["volume_error"])
    perfect = values(truth, truth)
    assert all(perfect[name] == 1 for name in ("dice", "iou", "recall", "precision", "nsd"))
    assert perfect["hd95"] == perfect["assd"] == perfect["volume_error"] == 0
    if prediction.any() and truth.any():  # air around the body changes nothing
        assert values(np.pad(prediction, margin), np.pad(truth, margin)) == pytest.approx(found)
    # axes may be permuted together with their spacing
    turned = values(prediction.transpose(2, 0, 1), truth.transpose(2, 0, 1), (3.0, 1.0, 2.0))
    assert turned == pytest.approx(values(prediction, truth, (1.0, 2.0, 3.0)), nan_ok=True)


# ------------------------------------------------------------------------------------------------- models and volumes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two volumes with boxes as organs, in oblique axis orders and with uneven spacing."""
    return boxes(tmp_path_factory.mktemp("data") / "Task99_Boxes")


@pytest.mark.parametrize("target", ["near", "far", "near,far", "all"])
def test_perfect_slices_are_a_perfect_volume_in_the_files_own_grid(folder, target):
    dataset = index(folder)
    bank = painted(dataset, target)
    model = Reader(len(bank.classes))
    table, examples = evaluate(model, bank, dataset, bank.cases)
    assert list(table.columns) == ["case", "class", "metric", "value"]
    assert len(table) == len(bank.cases) * len(bank.classes) * len(METRICS)
    wide = table.pivot(index=["case", "class"], columns="metric", values="value")
    assert (wide[["dice", "iou", "recall", "precision", "nsd"]] == 1).all(axis=None)
    assert (wide[["hd95", "assd", "volume_error"]] == 0).all(axis=None)
    volume = {"near": 8 * 15 * 6 * 12 / 1000, "far": 5 * 7 * 7 * 12 / 1000}  # voxels times 12 cubic mm
    for (_, name), value in wide["truth_volume"].items():
        assert value == pytest.approx(volume[name])
    assert volume_dice(model, bank) == 1
    for example in examples:
        assert example["image"].dtype == example["truth"].dtype == example["prediction"].dtype == np.uint8
        assert example["image"].shape == (32, 32)
        assert np.array_equal(example["truth"], example["prediction"])


def test_the_cut_is_at_a_probability_of_one_half(folder):
    # pixel values 128 and 127 make probabilities of 0.52 and 0.48
    dataset = index(folder)
    bank = painted(dataset, "near")
    close = dataclasses.replace(bank, images=bank.labels + 127)
    scores = torch.cat([found.flatten() for found in predict_cases(Reader(1), close).values()])
    assert 0.47 < scores.min() < 0.5 < scores.max() < 0.53
    table, examples = evaluate(Reader(1), close, dataset, bank.cases)
    inside = table[table["metric"] == "dice"]["value"]
    assert (inside == 1).all() and volume_dice(Reader(1), close) == 1
    assert np.array_equal(examples[0]["truth"], examples[0]["prediction"])


def test_the_published_cut_is_at_a_logit_of_one_half(folder):
    # pixel value 128 makes a logit of 0.1: foreground at a probability of 0.5, background at a logit of 0.5
    dataset = index(folder)
    bank = painted(dataset, "near")
    close = dataclasses.replace(bank, images=bank.labels + 127)
    table, examples = evaluate(Reader(1), close, dataset, bank.cases, LOGIT_CUT)
    assert (table[table["metric"] == "dice"]["value"] == 0).all() and not examples[0]["prediction"].any()
    assert volume_dice(Reader(1), close, threshold=LOGIT_CUT) == 0


def test_pooled_dice_lets_large_organs_decide(folder):
    bank = painted(index(folder), "near")
    inside = bank.labels > 0
    small = inside & (torch.arange(32)[:, None] < 14)  # of the second case, only a part is there and is missed
    labels = torch.where((bank.case_index == 1)[:, None, None], small, inside).to(torch.uint8)
    half = dataclasses.replace(bank, labels=labels, images=255 * labels * (bank.case_index == 0)[:, None, None])
    first, second = (int(labels[bank.case_index == case].sum()) for case in (0, 1))
    assert 0 < second < first
    assert volume_dice(Reader(1), half) == pytest.approx(0.5)
    assert volume_dice(Reader(1), half, pooled=True) == pytest.approx(2 * first / (2 * first + second))


def test_example_is_the_slice_with_most_truth(folder):
    dataset = index(folder)
    bank = painted(dataset, "all")
    _, examples = evaluate(Reader(2), bank, dataset, ["box_2"])
    assert [example["name"] for example in examples] == ["box_2"]
    assert (examples[0]["truth"] > 0).sum() == 8 * 15 + 5 * 7  # in slices 5 to 8 both boxes are cut


def test_error_in_slices_is_an_error_in_mm(folder):
    # the prediction is moved by one slice of 4 mm; along the file's axes that is z in box_1 and y in box_2
    dataset = index(folder)
    bank = painted(dataset, "near")
    moved = dataclasses.replace(bank, images=bank.images.roll(-1, 0))  # the first slice of a case is empty
    table, _ = evaluate(Reader(1), moved, dataset, bank.cases)
    wide = table.pivot(index="case", columns="metric", values="value")
    assert wide["hd95"].tolist() == pytest.approx([4.0, 4.0])
    assert wide["dice"].tolist() == pytest.approx([5 / 6, 5 / 6])
    assert volume_dice(Reader(1), moved) == pytest.approx(5 / 6)


def test_missed_and_absent_classes(folder):
    dataset = index(folder)
    bank = painted(dataset, "all")
    blind = dataclasses.replace(bank, images=torch.zeros_like(bank.images))
    table, _ = evaluate(Reader(2), blind, dataset, bank.cases)
    wide = table.pivot(index=["case", "class"], columns="metric", values="value")
    assert (wide[["dice", "recall"]] == 0).all(axis=None) and wide["precision"].isna().all()
    assert volume_dice(Reader(2), blind) == 0
    absent = dataclasses.replace(blind, labels=torch.zeros_like(bank.labels))
    assert volume_dice(Reader(2), absent) == 1


def test_volume_dice_is_the_mean_over_volumes_not_pixels(folder):
    # one volume right, the other missed
    bank = painted(index(folder), "near")
    half = dataclasses.replace(bank, images=bank.images * (bank.case_index == 0)[:, None, None])
    assert volume_dice(Reader(1), half) == pytest.approx(0.5)
    assert volume_dice(Reader(1), half, batch=3) == pytest.approx(0.5)


@pytest.mark.parametrize("target", ["near", "all"])
def test_probabilities_of_a_real_model(folder, target):
    bank = build(index(folder), index(folder).classes(target), Preprocessing(32))
    model = build_model("S1", classes=len(bank.classes)).train()
    # another batch size may round a bfloat16 sum the other way
    near = {"atol": 0.01, "rtol": 0} if computes_bf16(torch.device("cpu")) else {}
    found = predict_cases(model, bank)
    assert model.training
    assert list(found) == list(bank.cases)
    for case, scores in found.items():
        channels = len(bank.classes) + 1 if len(bank.classes) > 1 else 1
        assert scores.shape == (channels, int((bank.case_index == bank.cases.index(case)).sum()), 32, 32)
        assert not scores.requires_grad and scores.min() >= 0 and scores.max() <= 1
        torch.testing.assert_close(scores, predict_cases(model, bank.select([case]), batch=5)[case], **near)
        if channels > 1:
            torch.testing.assert_close(scores.sum(0), torch.ones(scores.shape[1:]))
    with torch.no_grad(), autocast(torch.device("cpu")):
        logits = model.eval()(bank.batch(torch.arange(4))[0]).segmentation.float()
    expected = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
    torch.testing.assert_close(found[bank.cases[0]][:, :4], expected.transpose(0, 1), **near)
    # the same answer as case by case from the volumes of labels
    dice = []
    for number, case in enumerate(bank.cases):
        labels = found[case].argmax(0) if len(found[case]) > 1 else (found[case][0] > 0.5).long()
        truth = bank.labels[bank.case_index == number]
        table = case_metrics(labels.numpy(), truth.numpy(), bank.classes, (1, 1, 1))
        dice += table.loc[table["metric"] == "dice", "value"].tolist()
    assert volume_dice(model, bank) == pytest.approx(np.mean(dice))


def test_the_models_mode_comes_back(folder):
    bank = painted(index(folder), "near")
    for mode in (True, False):
        model = Reader(1).train(mode)
        volume_dice(model, bank)
        predict_cases(model, bank)
        assert model.training is mode and set(model.modes) == {False}
        assert torch.is_grad_enabled()
    model = Reader(1).train()
    with pytest.raises(RuntimeError):
        predict_cases(model, dataclasses.replace(bank, images=bank.images[:, :0]).to("meta"))
    assert model.training and torch.is_grad_enabled()


def test_unknown_case_is_named(folder):
    dataset = index(folder)
    with pytest.raises(InputError, match="box_7"):
        evaluate(Reader(1), painted(dataset, "near"), dataset, ["box_7"])


@pytest.mark.parametrize(
    "name, target, view", [("hippocampus", "all", Preprocessing(64)), ("btcv", "liver,spleen", Preprocessing(256))]
)
def test_real_labels_survive_the_way_there_and_back(real_data, tmp_path, name, target, view):
    source, root = real_data(name), tmp_path / name
    text = json.loads((source / "dataset.json").read_text())
    text["training"] = [text["training"][0], text["training"][-1]]  # two cases, to be quick
    for file in (file for pair in text["training"] for file in pair.values()):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).symlink_to(source / file)
    (root / "dataset.json").write_text(json.dumps(text))
    dataset = index(root)
    bank = painted(dataset, target, view)
    table, _ = evaluate(Reader(len(bank.classes)), bank, dataset, bank.cases)
    wide = table.pivot(index=["case", "class"], columns="metric", values="value")
    assert (wide["dice"] == 1).all() and (wide["hd95"] == 0).all()
    assert (wide["truth_volume"] > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["near", "all"])
def test_cuda_agrees_with_cpu(folder, target):
    dataset = index(folder)
    bank = painted(dataset, target)
    here, _ = evaluate(Reader(len(bank.classes)), bank, dataset, bank.cases)
    there, _ = evaluate(Reader(len(bank.classes)).cuda(), bank.to("cuda"), dataset, bank.cases)
    assert here.equals(there)
    model = build_model("S1", classes=len(bank.classes))
    scores = predict_cases(model, bank)
    close = predict_cases(model.cuda(), bank.to("cuda"))
    for case in bank.cases:
        torch.testing.assert_close(close[case].cpu(), scores[case], atol=0.03, rtol=0)
