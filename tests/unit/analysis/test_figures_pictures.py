"""Figures of features, and the qualitative grid on bright tissue."""

from __future__ import annotations

from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from analysis_tables import check, identity

from kdlib.analysis.figures import DOUBLE, features, qualitative
from kdlib.analysis.gallery import trio
from kdlib.config import InputError

pytestmark = pytest.mark.slow  # they draw

ROLES = {"teacher": "T1", "student": "S1 (50 %)", "distilled student": "KD(T1, S1)"}


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


# ------------------------------------------------------------------------------------------------------------- features


def sampled(classes=("background", "spleen"), pixels=24, constant=False):
    """Three methods; the classes lie further apart from method to method."""
    random = np.random.default_rng(0)
    names = np.repeat(classes, pixels)
    shift = np.repeat(np.arange(len(classes)), pixels)[:, None]
    arrays = {"case": np.array(["a", "b"] * (len(names) // 2)), "class": names}
    for number, (method, channels) in enumerate(zip(ROLES.values(), (16, 4, 4), strict=True)):
        values = random.normal(size=(len(names), channels)) + 4 * number * shift
        arrays[method] = np.zeros_like(values) if constant else values
    return pd.DataFrame({name: list(values) for name, values in arrays.items()})


def similar(scales=("encoder1", "bottleneck", "decoder1", "logits"), more=("encoder2", "decoder2")):
    rows = [
        identity(method)
        | dict(fold=fold, scale_student=a, scale_teacher=b, value=0.2 + 0.1 * fold + 0.3 * (method == "KD(T1, S1)"))
        for method in ("S1 (50 %)", "KD(T1, S1)") for fold in (0, 1)
        for a in scales for b in (*reversed(scales), *more)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("classes", [("background", "spleen"), ("a", "background", "b", *"cdefgh")])
def test_features_by_class_before_and_after(classes):
    samples = sampled(classes)
    figure = features(samples, similar(), ROLES)
    check(figure, DOUBLE)
    axes = np.array(figure.axes).reshape(3, 3)
    assert [ax.get_title() for ax in axes[0]] == [
        "teacher",
        "student\nno distillation",
        "distilled student\nKD(T1, S1)",
    ]
    for ax in axes[:2].flat:
        assert sum(len(dots.get_offsets()) for dots in ax.collections) == len(samples)
        assert len(ax.collections) == len(classes)
    found = [float(ax.get_title().split()[-1]) for ax in axes[1]]
    assert found == sorted(found) and found[0] < 0.1 < 0.3 < found[2], "silhouettes follow how far classes lie apart"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == sorted(classes) and legend[-1] == "background"
    assert f"n = {len(samples)} pixels of 2 test cases" in figure.get_label()


def test_the_cka_matrices_are_in_forward_order_and_average_folds():
    axes = np.array(features(sampled(), similar(), ROLES).axes).reshape(3, 3)
    for ax, expected in zip(axes[2], ("+30", "25", "55"), strict=True):
        assert {text.get_text() for text in ax.texts} == {expected} and len(ax.texts) == 4 * 6
        assert [label.get_text() for label in ax.get_xticklabels()] == ["E1", "E2", "B", "D2", "D1", "L"]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["E1", "B", "D1", "L"]
    assert [ax.get_title() for ax in axes[2]] == ["KD(T1, S1) minus no distillation", "no distillation", "KD(T1, S1)"]


def test_the_same_features_give_the_same_picture():
    one, two = (features(sampled(), similar(), ROLES) for _ in range(2))
    for a, b in zip(one.axes[:6], two.axes[:6], strict=True):
        for left, right in zip(a.collections, b.collections, strict=True):
            assert np.array_equal(left.get_offsets(), right.get_offsets())


def test_features_refuse():
    with pytest.raises(InputError, match=r"no KD\(T1, S1\) in the table"):
        features(sampled().drop(columns="KD(T1, S1)"), similar(), ROLES)
    with pytest.raises(InputError, match=r"no similarity of 'KD\(T1, S1\)'; the table has S1 \(50 %\)"):
        features(sampled(), similar()[lambda t: t["method"] == "S1 (50 %)"], ROLES)
    with pytest.raises(InputError, match="2 methods"):
        features(sampled(), similar(), {"teacher": "T1", "student": "S1 (50 %)"})
    with pytest.raises(InputError, match="those of T1 are the same in every pixel"):
        features(sampled(constant=True), similar(), ROLES)


# ---------------------------------------------------------------------------------------------------------- qualitative


DICE = pd.DataFrame([identity("S1") | {"case": "a", "class": "spleen", "metric": "dice", "value": 0.9}])


def example(image, truth, prediction):
    return pd.DataFrame([identity("S1") | dict(case="a", seed=0, image=image, truth=truth, prediction=prediction)])


def test_the_outline_of_the_truth_is_seen_on_white_tissue():
    truth = np.zeros((48, 48), np.uint8)
    truth[16:32, 16:32] = 1
    shown = example(np.full((48, 48), 255, np.uint8), truth, truth)
    figure = qualitative(shown, {"student": "S1"}, {"only": "a"}, DICE)
    figure.set_dpi(300)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].mean(2)
    box = figure.axes[1].get_window_extent()
    top, bottom, left, right = (int(edge) for edge in (len(pixels) - box.y1, len(pixels) - box.y0, box.x0, box.x1))
    seen = pixels[top + 2 : bottom - 2, left + 2 : right - 2]
    assert (seen < 128).sum() > 4 * 16, "a dark rim about the white line"


def test_the_input_is_trimmed_to_what_is_not_black():
    image, mask = np.zeros((2, 64, 64), np.uint8)
    image[10:50, 12:52], mask[24:30, 24:30] = 90, 1
    figure = qualitative(example(image, mask, mask), {"student": "S1"}, {"only": "a"}, DICE)
    assert figure.axes[0].get_xlim() == (11.5, 51.5) and figure.axes[0].get_ylim() == (49.5, 9.5)


def test_pictures_show_t1_and_s1_else_the_first_pair():
    names = ["T1", "T2", "E1 (50 %)", "KD(T2, E1)", "S1 (50 %)", "KD(T1, S1)"]
    runs = pd.DataFrame([identity(name) for name in names])
    assert trio(SimpleNamespace(runs=runs)) == {
        "teacher": "T1", "S1 alone": "S1 (50 %)", "S1 distilled": "KD(T1, S1)",
    }  # fmt: skip
    assert trio(SimpleNamespace(runs=runs[runs["model"] != "S1"])) == {
        "teacher": "T2", "E1 alone": "E1 (50 %)", "E1 distilled": "KD(T2, E1)",
    }  # fmt: skip
    with pytest.raises(InputError, match="no run with role distilled, loss supcon in the study"):
        trio(SimpleNamespace(runs=runs[runs["role"] != "distilled"]))
