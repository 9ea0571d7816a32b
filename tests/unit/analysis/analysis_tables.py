"""Small tidy tables, and what holds for every figure, for the tests of `kdlib.analysis`."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

CONTROL = {"zero-weight control": "zero_weights", "shuffled teacher": "shuffled_teacher"}
FAMILY = {"kl": "prediction", "dkd": "prediction", "fitnet": "feature", "sp": "relation", "infonce": "contrast"}


def identity(name: str, /, **columns) -> dict[str, object]:
    """Identity columns of a method that is called like its label, e.g. "T1", "S1 (50 %)" or "KD(T1, S1)"."""
    found = dict(method=name, model="S1", role="baseline", teacher="", fraction=1.0, recipe="", terms="", loss="")
    found |= dict(loss_label="", family="", control="", protocol="corrected")
    if named := re.fullmatch(r"KD\((\w+), (\w+)\)", name):
        found |= dict(teacher=named[1], model=named[2], role="distilled", terms="E-E+B-B+D-D+PMD", loss="supcon")
        found |= dict(loss_label="supervised contrast", family="contrast", fraction=0.5)
    elif name in CONTROL:
        found |= dict(role="control", control=CONTROL[name], fraction=0.5)
    elif named := re.fullmatch(r"(\w+) \((\d+) %\)", name):
        found |= dict(model=named[1], fraction=int(named[2]) / 100)
    elif name[0] in "TS" and len(name) == 2:
        found |= dict(model=name, role="teacher" if name[0] == "T" else "baseline")
    return found | columns


def distilled(loss: str, terms: str = "PMD", **columns) -> dict[str, object]:
    """Identity columns of S1 on half of the labels, distilled from T1 with one loss."""
    names = dict(loss=loss, loss_label=loss.upper(), family=FAMILY.get(loss, "contrast"), terms=terms)
    return identity("KD(T1, S1)", **(names | {"method": f"{loss}:{terms}"} | columns))


def tidy(methods: dict[str, object], metric="dice", **columns) -> pd.DataFrame:
    """A table of method -> values, one case each (or a list of values per case, one per seed)."""
    rows = []
    for method, values in methods.items():
        for number, seeds in enumerate(values):
            for seed, value in enumerate(np.atleast_1d(seeds)):
                row = dict(run=f"{method}-{seed}", method=method, model="S1", fold=0, seed=seed)
                row |= dict.fromkeys(("patient", "case"), f"case_{number}")
                rows.append(row | {"class": "spleen", "metric": metric, "value": value} | columns)
    return pd.DataFrame(rows)


def check(figure, width, smallest=7) -> None:
    """Drawn at printed width, no text is cut off or under the legend, no panel is empty, no text is tiny."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    assert figure.get_size_inches()[0] == pytest.approx(width)
    page = figure.bbox.padded(2)
    legends = [legend.get_window_extent(renderer) for legend in figure.legends]
    panels = [ax.get_tightbbox(renderer) for ax in figure.axes]
    for box in legends + panels:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, "something is cut"
    for one, two in itertools.combinations(legends + panels, 2):
        assert not one.padded(-1).overlaps(two), "panels or legend overlap"
    for text in figure.findobj(Text):
        assert text.get_fontsize() >= smallest or not text.get_text()
    for ax in figure.axes:
        assert ax.has_data()
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            labels = [tick.label1 for tick in ticks if tick.label1.get_visible() and tick.label1.get_text()]
            boxes = [label.get_window_extent(renderer) for label in labels]
            for one, two in itertools.pairwise(boxes):
                assert not one.overlaps(two), "tick labels overlap"
    assert "n = " in figure.get_label()
