"""The pairs of a supervised contrastive loss: those that a training step draws, and their figure."""

from __future__ import annotations

import dataclasses
import itertools

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import PathCollection
from torch.nn import functional as F

from kdlib.analysis.figures import DOUBLE, pairs
from kdlib.config import PROTOCOLS, InputError, Run, Term, derive_seed, override_profile
from kdlib.data.sampling import batch_indices
from kdlib.experiments.illustrate import pairs as pairs_of
from kdlib.experiments.recipes import thesis_recipe
from kdlib.experiments.source import run_bank, run_source
from kdlib.files import read_arrays, write_arrays
from kdlib.losses import Context, SupervisedContrastiveLoss
from kdlib.training.hooks import FeatureHooks
from kdlib.training.state import new_model, new_state


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def place(tmp_path_factory, phantom_of):
    """A folder of results, and a distilled run on a small phantom in it; nothing is trained."""
    root = tmp_path_factory.mktemp("pictures")
    profile = override_profile("quick", {"width": 0.125, "folds": 3})
    data = str(phantom_of(9))
    return root, Run(data, "spleen", "S1", fraction=0.5, teacher="T1", recipe=thesis_recipe("S1"), profile=profile)


def check(figure, width) -> None:
    """At printed width, within the page, without overlaps, empty panels or tiny text."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    assert figure.get_size_inches()[0] == pytest.approx(width)
    page = figure.bbox.padded(2)
    boxes = [item.get_window_extent(renderer) for item in figure.legends]
    boxes += [ax.get_tightbbox(renderer) for ax in figure.axes]
    for box in boxes:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, "something is cut"
    for one, two in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(two), "panels or legend overlap"
    assert all(ax.has_data() for ax in figure.axes)
    assert all(text.get_fontsize() >= 6 for text in figure.findobj(matplotlib.text.Text) if text.get_text())


# ---------------------------------------------------------------------------------------------- the pairs of a contrast


@pytest.mark.parametrize("same_patient", [False, True])
def test_the_pairs_spelt_out_give_the_loss(same_patient):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 5, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(3, (4, 6, 6), generator=generator)
    patients = torch.tensor([4, 4, 7, 9])
    loss = SupervisedContrastiveLoss(0.4, samples=60, same_patient=same_patient)
    drawn = loss.draw(labels, torch.Generator().manual_seed(1))
    relation = loss.relation(drawn, drawn, labels, patients)
    anchors, keys = (F.normalize(x.movedim(1, -1).flatten(0, 2)[drawn], dim=1) for x in (student, teacher))
    similarity = anchors @ keys.T / 0.4
    everything = similarity.masked_fill(relation == 0, -torch.inf).logsumexp(1)
    each = everything - (similarity * (relation > 0)).sum(1) / (relation > 0).sum(1)
    own = labels.flatten()[drawn]
    expected = torch.stack([each[own == value].mean() for value in own.unique()]).mean()
    found = loss(student, teacher, labels, Context(torch.Generator().manual_seed(1), patients))
    torch.testing.assert_close(found, expected)
    assert (relation.diagonal() == 1).all(), "the key at the anchor's own position is a positive"
    assert (relation == 0).any() == same_patient


def test_pairs_by_hand():
    labels = torch.tensor([[[0, 1], [1, 2]], [[0, 0], [1, 1]]])
    keys = torch.tensor([0, 1, 3, 4, 6])
    loss = SupervisedContrastiveLoss(samples=None)
    assert loss.relation(torch.tensor([1, 0]), keys, labels).tolist() == [[-1, 1, -1, -1, 1], [1, -1, -1, 1, -1]]
    alone = SupervisedContrastiveLoss(samples=None, same_patient=True)
    patients = torch.tensor([5, 5])
    assert alone.relation(torch.tensor([1]), keys, labels, patients).tolist() == [[0, 1, 0, 0, 0]]
    with pytest.raises(InputError, match="needs to know the patient"):
        alone.relation(torch.tensor([1]), keys, labels)


def test_the_pairs_are_those_that_a_training_step_draws(place, monkeypatch):
    results, run = place
    panels = pairs_of(run, results)
    # the same batch through the distiller of the run, with the seed of that step
    fold = run_source(run, results).folds[0]
    bank = run_bank(run, results).select(fold.subset(0.5))
    how = run.optimisation
    drawn_batches = batch_indices(bank.holds_target, how.batch, run.seed, how.target_share)
    index = next(i for i in drawn_batches if bank.labels[i].any())
    step = int(panels["step"][0])
    images, labels = bank.batch(index)
    (teacher_run,) = run.teacher_runs().values()
    teacher = new_model(teacher_run, 1).eval()
    arm = new_state(run, 1, 1, torch.device("cpu"), {"T1": teacher})
    seen = []
    draw = SupervisedContrastiveLoss.draw

    def recorded(self, labels, generator=None):
        seen.append((labels.shape, draw(self, labels, generator)))
        return seen[-1][1]

    monkeypatch.setattr(SupervisedContrastiveLoss, "draw", recorded)
    _, own = arm.hooks(images)
    _, taught = FeatureHooks(teacher, list(own))(images)
    seed = derive_seed(run.seed, "terms", step)
    terms = {name: term for name, term in arm.distiller.terms.items() if name == "D-D"}
    arm.distiller.terms = torch.nn.ModuleDict(terms)
    arm.distiller(own, {"T1": taught}, labels, seed)
    ((shape, drawn),) = seen
    role = torch.zeros(shape, dtype=torch.bool).flatten()
    role[drawn] = True
    role = role.view(shape)
    for number in range(len(panels["case"])):
        picture = torch.from_numpy(panels["image"][number])
        same = [i for i in range(len(index)) if torch.equal(bank.images[index[i]], picture)]
        assert same and any(np.array_equal(panels["role"][number] != 0, role[i]) for i in same)
    assert panels["positives"][0] + panels["negatives"][0] == len(drawn)


def test_the_panels_show_an_organ_s_and_a_background_anchor_on_slices_of_the_batch(place):
    results, run = place
    panels, size = pairs_of(run, results), run.preprocessing.size
    assert panels["anchor"].tolist() == ["spleen"] * 3 + ["background"] * 3
    assert panels["image"].shape == panels["labels"].shape == panels["role"].shape == (6, size, size)
    assert (panels["row"] >= 0).tolist() == [True, False, False] * 2, "the anchor is on its own slice alone"
    patients = run_source(run, results).folds[0].groups
    assert patients[panels["case"][0]] != patients[panels["case"][1]]
    for number, anchor in enumerate(panels["anchor"]):
        role, target = panels["role"][number], panels["labels"][number] == 1
        wanted = target if anchor == "spleen" else ~target
        assert wanted[role == 1].all() and not wanted[role == -1].any()
    for number in (0, 3):
        assert panels["role"][number][panels["row"][number], panels["column"][number]] == 1
    assert (panels["labels"] > 0).sum((1, 2)).tolist()[:3] == sorted((panels["labels"][:3] > 0).sum((1, 2)))[::-1]
    assert set(panels["term"]) == {"D-D"}, "the labelled term on the finest grid"


def test_pairs_of_a_coarse_term_are_on_its_grid(place):
    results, run = place
    recipe = dataclasses.replace(run.recipe, terms=(Term("E-E", "supcon", 0.1),))
    panels = pairs_of(dataclasses.replace(run, recipe=recipe), results)
    size = run.preprocessing.size
    assert panels["role"].shape == (6, size // 4, size // 4) and panels["image"].shape == (6, size, size)
    figure = pairs(as_table(panels))
    star = figure.axes[0].lines[-1]
    row, column = panels["row"][0], panels["column"][0]
    assert star.get_xdata() == [4 * column + 1.5] and star.get_ydata() == [4 * row + 1.5], "the middle of 4 x 4 pixels"


def test_pairs_need_a_contrast_with_labels(place):
    results, run = place
    for changed in (
        dataclasses.replace(run, recipe=thesis_recipe("S1", "fitnet")),
        dataclasses.replace(run, protocol=PROTOCOLS["thesis"]),
    ):
        with pytest.raises(InputError, match="no supervised contrastive loss"):
            pairs_of(changed, results)
    hidden = dataclasses.replace(run, fraction=0.5, recipe=dataclasses.replace(run.recipe, unlabelled=True))
    with pytest.raises(InputError, match="images without labels"):
        pairs_of(hidden, results)


def as_table(arrays) -> pd.DataFrame:
    return pd.DataFrame({name: list(values) for name, values in arrays.items()})


def test_the_figure_of_pairs_marks_what_was_drawn(place, tmp_path):
    results, run = place
    write_arrays(tmp_path / "pairs.npz", pairs_of(run, results))
    panels = read_arrays(tmp_path / "pairs.npz")
    figure = pairs(panels)
    check(figure, DOUBLE)
    assert len(figure.axes) == 6
    for ax, panel in zip(figure.axes, panels.itertuples(), strict=True):
        positive, negative = (c for c in ax.collections if isinstance(c, PathCollection))
        assert len(positive.get_offsets()) == (panel.role == 1).sum()
        assert len(negative.get_offsets()) == (panel.role == -1).sum()
        for x, y in negative.get_offsets():
            assert panel.role[round(y), round(x)] == -1
        assert f"{(panel.role == 1).sum()} positive, {(panel.role == -1).sum()} negative" in ax.get_xlabel()
    assert figure.axes[0].get_ylabel().startswith("anchor: spleen\n")
    assert f"{run.optimisation.batch} slices of the batch" in figure.get_label()
    with pytest.raises(InputError, match="no role in the table"):
        pairs(panels.drop(columns="role"))
