"""The method's diagram: its table follows the networks and the recipe, and its drawing keeps clear of itself."""

from __future__ import annotations

import dataclasses
import io
import itertools

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.patches import FancyBboxPatch
from monai.networks.nets import SegResNet

from kdlib.analysis.figures import DOUBLE, diagram
from kdlib.config import PROFILES, InputError, Recipe, Run, Term
from kdlib.experiments.illustrate import plan
from kdlib.experiments.recipes import distiller, thesis_recipe
from kdlib.models import MODELS, ExternalModel

RUN = Run("phantom", "spleen", "S1", fraction=0.5, teacher="T1", recipe=thesis_recipe("S1"))
FULL = dataclasses.replace(RUN, profile=PROFILES["thesis"])


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def outside(monkeypatch):
    layers = {"encoder2": "down_layers.1", "bottleneck": "down_layers.3", "decoder1": "up_layers.2"}
    monkeypatch.setitem(MODELS, "SegResNet", lambda d, i, o: ExternalModel(SegResNet(d, 8, i, o), layers))


def stages(table, role):
    rows = table[(table["role"] == role) & (table["kind"] == "stage")].set_index("name")
    return rows[["channels", "stride"]].apply(tuple, axis=1).to_dict()


def terms(table):
    return table[table["kind"] == "term"].set_index("name")


def test_the_plan_has_the_thesis_s_scales_widths_and_terms():
    table = plan(FULL)
    assert stages(table, "teacher") == {
        "encoder1": (64, 1), "encoder2": (128, 2), "encoder3": (256, 4), "encoder4": (512, 8), "bottleneck": (1024, 16),
        "decoder1": (64, 1), "decoder2": (128, 2), "decoder3": (256, 4), "decoder4": (512, 8), "logits": (1, 1),
    }  # fmt: skip
    assert stages(table, "student") == {
        "encoder1": (16, 1), "encoder2": (32, 2), "bottleneck": (64, 4), "decoder1": (16, 1), "decoder2": (32, 2),
        "logits": (1, 1),
    }  # fmt: skip
    assert terms(table)["weight"].to_dict() == {"E-E": 0.1, "B-B": 0.2, "D-D": 0.1, "PMD": 0.2}
    assert terms(table)["temperature"].tolist() == [0.4, 0.4, 0.4, 4.0]
    assert terms(table)["channels"].tolist()[:3] == [64] * 3 and pd.isna(terms(table)["channels"]["PMD"])
    assert "1024 channels on 16 x 16" in terms(table)["compared"]["B-B"]
    losses = table[table["kind"] == "loss"]
    assert list(zip(losses["role"], losses["name"], losses["weight"], strict=True)) == [
        ("teacher", "Dice + cross-entropy", 1.0), ("teacher", "reconstruction MSE", 0.2), ("student", "Dice", 0.4),
    ]  # fmt: skip


@pytest.mark.parametrize("model", ["S1", "S2"])
@pytest.mark.parametrize("teacher", ["T1", "T2"])
def test_the_stages_parameters_add_up_to_the_network_s(model, teacher):
    table = plan(dataclasses.replace(RUN, model=model, teacher=teacher), classes=3)
    for role in ("teacher", "student"):
        rows = table[table["role"] == role].set_index("kind")
        parts = rows.loc[["stage"], "parameters"].sum()
        assert parts == rows.loc["network", "inference_parameters"]
        spare = rows.loc["reconstruction", "parameters"] if role == "teacher" else 0
        assert parts + spare == rows.loc["network", "parameters"]
        assert stages(table, role)["logits"] == (4, 1)


def test_the_plan_follows_a_change_of_width_of_weight_and_of_place():
    wide = dataclasses.replace(RUN, profile=dataclasses.replace(RUN.profile, width=0.5))
    assert stages(plan(wide), "teacher")["bottleneck"] == (512, 16) != stages(plan(RUN), "teacher")["bottleneck"]
    moved = Term("D-D", "fitnet", 0.7, student_layers="decoder2", teacher_layers="decoder3", projector="frozen")
    recipe = dataclasses.replace(RUN.recipe, terms=(*RUN.recipe.terms[:2], moved), segmentation_weight=0.9, balance=0.5)
    table = plan(dataclasses.replace(RUN, recipe=recipe))
    assert list(terms(table).index) == ["E-E", "B-B", "D-D"]
    found = terms(table).loc["D-D"]
    assert (found["loss"], found["weight"], found["student_at"], found["teacher_layers"]) == (
        "MSE", 0.7, "decoder2", "decoder3",
    )  # fmt: skip
    assert found["channels"] == 64 and "a frozen 1x1 projection" in found["compared"] and found["balance"] == 0.5
    assert table.loc[(table["kind"] == "loss") & (table["role"] == "student"), "weight"].tolist() == [0.9]


def test_a_plan_needs_one_teacher():
    for run in (dataclasses.replace(RUN, teacher="T1+T2"), dataclasses.replace(RUN, teacher=None, recipe=None)):
        with pytest.raises(InputError, match="one teacher"):
            plan(run)


def many():
    places = [("encoder1", "encoder1"), ("encoder1", "encoder3"), ("decoder2", "decoder4"), ("decoder1", "decoder1")]
    return Recipe(
        "many",
        terms=tuple(Term(f"t{i}", "at", 1, student_layers=a, teacher_layers=b) for i, (a, b) in enumerate(places)),
    )


DRAWN = {
    "T1 to S1": RUN,
    "T1 to S1, full width": FULL,
    "T2 to S2": dataclasses.replace(RUN, model="S2", teacher="T2", recipe=thesis_recipe("S2")),
    "ReviewKD": dataclasses.replace(FULL, recipe=distiller("reviewkd", "S1")),
    "a student is_teacher": dataclasses.replace(RUN, teacher="S1"),
    "from elsewhere": dataclasses.replace(RUN, model="SegResNet"),
    "across scales": dataclasses.replace(RUN, recipe=many()),
}


@pytest.mark.parametrize("name", DRAWN)
def test_no_box_overlaps_another_and_no_text_leaves_its_box_or_the_page(name, outside):
    file = io.StringIO()
    plan(DRAWN[name]).to_csv(file, index=False)
    file.seek(0)
    figure = diagram(pd.read_csv(file))  # drawn from the file alone
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    assert figure.get_size_inches()[0] == pytest.approx(DOUBLE)
    (ax,) = figure.axes
    boxes = [patch.get_window_extent(renderer) for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
    for one, two in itertools.combinations(boxes, 2):
        assert not one.overlaps(two)
    for text in ax.texts:
        if text.get_text():
            extent = text.get_window_extent(renderer)
            inside = [box for box in boxes if box.padded(2).containsx(extent.x0) and box.overlaps(extent)]
            assert text.get_fontsize() >= 6.5
            assert all(box.x0 <= extent.x0 and extent.x1 <= box.x1 for box in inside)
            page = figure.bbox
            assert page.x0 <= extent.x0 and extent.x1 <= page.x1 and page.y0 <= extent.y0 and extent.y1 <= page.y1


def test_the_drawing_says_what_the_plan_says():
    words = [text.get_text() for text in diagram(plan(FULL)).axes[0].texts]
    assert "teacher T1, frozen: 43.2 M parameters (31.0 M without the reconstruction decoder)" in words
    assert "student S1: 57.3 k parameters" in words and "B-B: weight 0.2" in words
    assert "supervised contrastive loss, τ = 0.4" in words and "64 ch., 1/16 to 1/4" in words and "64 ch., 1/4" in words
    assert "own losses:\nDice + cross-entropy × 1\nreconstruction MSE × 0.2" in words
    assert words.count("512 ch.") == 2 and "1/16, 14.2 M" in words


def test_a_diagram_refuses_what_is_no_plan():
    table = plan(RUN)
    with pytest.raises(InputError, match="no teacher_layers in the table"):
        diagram(table.drop(columns="teacher_layers"))
    with pytest.raises(InputError, match="'encoder9', which is no stage of the student"):
        diagram(table.assign(student_at=table["student_at"].replace("bottleneck", "encoder9")))
    with pytest.raises(InputError, match="teacher: neck"):
        diagram(table.assign(name=table["name"].replace("bottleneck", "neck")))
