"""The method's own diagram, drawn from a table that is read off the networks and the recipe."""

from __future__ import annotations

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from kdlib.analysis.figures.style import DOUBLE, MM, OTHER_COLOURS, STYLE, TERM_COLOURS, method_style, need_columns
from kdlib.config import InputError

BOX = 15.4, 9.6  # mm of a stage
LEVEL, GAP = 11.5, 27.0  # mm from one resolution to the next, and between the two bottlenecks
MARGIN = 14.0  # mm above and below, for titles and losses
NEEDED = ["kind", "model", "role", "name", "channels", "stride", "parameters", "weight", "student_at", "teacher_layers"]
STROKES = ("-", "--", "-.", ":")  # of terms, in turn, so that they can be told apart in grey


@plt.rc_context(STYLE)
def diagram(plan: pd.DataFrame) -> Figure:
    """Teacher above, student below, each a U of its stages; lines are the terms, from what is_teacher to what is taught.

    Args:
        plan: `kdlib.experiments.illustrate.plan`, or the CSV file of it.

    Raises:
        InputError: a missing column, or a term at a scale that is no stage of its network.
    """
    need_columns(plan, NEEDED, "diagram", "kdlib.experiments.illustrate.plan")
    stages = {role: _stages(plan, role) for role in ("teacher", "student")}
    depth = max(table["level"].max() for table in stages.values())
    levels = {role: table["level"].max() for role, table in stages.items()}
    height = 2 * MARGIN + GAP + LEVEL * sum(levels.values()) + BOX[1]
    width = DOUBLE / MM
    figure, ax = plt.subplots(figsize=(DOUBLE, height * MM))
    figure.get_layout_engine().set(w_pad=0, h_pad=0)  # one unit of the axes is a millimetre of paper
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()
    pitch = width / (2 * depth + 2)
    top, bottom = height - MARGIN - BOX[1] / 2, MARGIN + BOX[1] / 2
    places, strides = {}, {}
    for role, table in stages.items():
        # the student stands on its head, so that the bottlenecks face each other
        rise = -LEVEL if role == "teacher" else LEVEL
        for row in table.itertuples():
            column = {"down": row.level, "middle": depth, "up": 2 * depth - row.level, "end": 2 * depth + 1}[row.side]
            x = pitch * (0.5 + column)
            places[role, row.name] = x, (top if role == "teacher" else bottom) + rise * row.level
        strides |= {(role, row.name): row.stride for row in table.itertuples()}
        _network(ax, plan, table, {name: place for (who, name), place in places.items() if who == role}, role)
    _terms(ax, plan[plan["kind"] == "term"], places, strides)
    note = (
        "Drawn from the networks and the recipe themselves. A box: a stage's channels, resolution as a part of the "
        "input's, and parameters (up-sampling included); the darker, the more channels. Grey arrows: skip connections, "
        "which the reconstruction decoder gets too. Coloured lines: what is_teacher what, with its weight, loss (τ: "
        "temperature), and the channels and resolution that both are brought to."
    )
    balance = plan["balance"].dropna().unique() if "balance" in plan else []
    if len(balance):
        note += f" The terms' gradients together are kept at {balance[0]:g} times the segmentation loss's."
    figure.set_label(note)
    return figure


def _stages(plan: pd.DataFrame, role: str) -> pd.DataFrame:
    """Stages of a network with their side of the U (down, middle, up, end) and their level in it, in forward order."""
    rows = plan[(plan["kind"] == "stage") & (plan["role"] == role)].copy()
    number = rows["name"].str.extract(r"(\d+)$")[0].astype(float)
    side = {"encoder": "down", "bottleneck": "middle", "decoder": "up", "logits": "end"}
    rows["side"] = rows["name"].str.rstrip("0123456789").map(side)
    if rows.empty or rows["side"].isna().any():
        odd = ", ".join(rows.loc[rows["side"].isna(), "name"]) or "no stage"
        raise InputError(f"diagram, {role}: {odd}; a U has encoder1..n, bottleneck, decoder1..n and logits")
    deepest = number.max()
    rows["level"] = (number - 1).where(rows["side"] != "middle", deepest).fillna(0).astype(int)
    order = rows["side"].map({"down": 0, "middle": 1, "up": 2, "end": 3}) * 100
    return rows.assign(order=order + rows["level"].where(rows["side"] == "down", -rows["level"])).sort_values("order")


def _network(ax: Axes, plan: pd.DataFrame, stages: pd.DataFrame, places: dict, role: str) -> None:
    """Boxes of the stages, arrows between them, skips, the reconstruction decoder, losses and title."""
    rows = plan[plan["role"] == role]
    model = rows["model"].iloc[0]
    colour = method_style(model)["color"]
    boxes, most = {}, float(plan.loc[plan["kind"] == "stage", "channels"].max())
    for row in stages.itertuples():
        size = f"{_share(row.stride)}, {_short(row.parameters)}" if pd.notna(row.parameters) else _share(row.stride)
        lines = [re.sub(r"(\d+)$", r" \1", row.name), f"{row.channels:.0f} ch.", size]
        boxes[row.name] = _box(ax, places[row.name], BOX, lines, colour, float(row.channels) / most)
    names = list(stages["name"])
    for one, other in zip(names, names[1:], strict=False):
        _arrow(ax, boxes[one], boxes[other], colour)
    for name in names:
        partner = name.replace("encoder", "decoder")
        if partner != name and partner in places:
            _arrow(ax, boxes[name], boxes[partner], "#999999", 0.6)
    outward = 1 if role == "teacher" else -1
    far = {1: "bottom", -1: "top"}[outward]
    clear = outward * (BOX[1] / 2 + 1)
    edge = max(outward * y for _, y in places.values()) * outward + clear
    total = rows[rows["kind"] == "network"].iloc[0]
    spare = rows[rows["kind"] == "reconstruction"]
    title = f"{role} {model}{', frozen' if role == 'teacher' else ''}: {_short(total['parameters'])} parameters"
    if len(spare):
        title += f" ({_short(total['inference_parameters'])} without the reconstruction decoder)"
        _reconstruction(ax, spare.iloc[0], boxes["bottleneck"], places[names[0]][1] - LEVEL / 2, colour)
    look = dict(ha="center", va=far)
    middle = places["bottleneck"][0]
    ax.text(middle, edge + outward * 3.2, title, fontsize=7.5, color=colour, weight="bold", **look)
    ax.text(places[names[0]][0], places[names[0]][1] + clear, "input slice", fontsize=6.5, **look)
    losses = rows[rows["kind"] == "loss"]
    text = "\n".join(f"{name} × {weight:g}" for name, weight in zip(losses["name"], losses["weight"], strict=True))
    right = places["logits"][0] + BOX[0] / 2
    ax.text(right, edge, f"own losses:\n{text}", ha="right", va=far, fontsize=6.5, linespacing=1.1)


def _reconstruction(ax: Axes, row: pd.Series, bottleneck: FancyBboxPatch, y: float, colour: str) -> None:
    """The second decoder, a box amid the skips that feed it."""
    lines = ["reconstruction decoder", f"{_short(row['parameters'])}, in training only"]
    box = _box(ax, (_centre(bottleneck)[0], y), (34, 7.4), lines, colour, 0, dashed=True)
    _arrow(ax, bottleneck, box, colour, stroke=":")


def _terms(ax: Axes, terms: pd.DataFrame, places: dict, strides: dict) -> None:
    """A line and a label a term, on the line where there is room."""
    colours = dict(zip(terms["name"].unique(), OTHER_COLOURS * 4, strict=False)) | TERM_COLOURS
    strokes = {name: STROKES[i % len(STROKES)] for i, name in enumerate(terms["name"].unique())}
    labelled, used = {}, []
    for row in terms.itertuples():
        ends = [
            _end(places, role, place) for role, place in (("teacher", row.teacher_layers), ("student", row.student_at))
        ]
        shift = 1.5 * used.count(ends)  # terms between the same two
        used.append(ends)
        (x0, y0), (x1, y1) = ends
        y0, y1 = y0 - BOX[1] / 2, y1 + BOX[1] / 2
        colour = colours[row.name]
        look = dict(arrowstyle="-|>", color=colour, linestyle=strokes[row.name], linewidth=1.5, shrinkA=0, shrinkB=0)
        ax.annotate("", (x1 + shift, y1), (x0 + shift, y0), arrowprops=look, zorder=3)
        labelled.setdefault(row.name, (row, (x0 + shift, y0), (x1 + shift, y1)))
    taken = [(centre, BOX) for centre in places.values()]
    for name, (row, start, end) in labelled.items():
        temperature = f", τ = {row.temperature:g}" if pd.notna(row.temperature) else ""
        resolutions = [
            _resolution(strides, "teacher", row.teacher_layers),
            _resolution(strides, "student", row.student_at),
        ]
        where = " to ".join(dict.fromkeys(resolutions))
        where = f"{row.channels:.0f} ch., {where}" if pd.notna(row.channels) else where
        lines = [f"{name}: weight {row.weight:g}", f"{row.loss}{temperature}", where]
        width = 3 + 1.15 * max(map(len, lines))
        size = width, BOX[1]
        centre = _free(start, end, size, ax.get_xlim()[1], taken)
        taken.append((centre, size))
        _box(ax, centre, size, lines, colours[name], 0)


def _free(start, end, size, page: float, taken: list) -> tuple[float, float]:
    """Where a label of this size, on a line or as near to it as may be, covers no box, else its middle."""
    fits = []
    for part in np.linspace(0.1, 0.9, 17):
        for aside in np.linspace(-25, 25, 21):
            x = start[0] + part * (end[0] - start[0]) + aside
            x = min(max(x, size[0] / 2 + 1), page - size[0] / 2 - 1)
            y = start[1] + part * (end[1] - start[1])
            apart = [
                abs(x - a) > (size[0] + w) / 2 + 1 or abs(y - b) > (size[1] + h) / 2 + 1 for (a, b), (w, h) in taken
            ]
            fits.append((not all(apart), abs(aside), abs(part - 0.5), x, y))
    return min(fits)[3:]


def _resolution(strides: dict, role: str, place: str) -> str:
    name, _, factor = place.partition("/")
    return _share(strides[role, name] * int(factor or 1))


def _end(places: dict, role: str, place: str) -> tuple[float, float]:
    name = place.partition("/")[0]
    if (role, name) not in places:
        raise InputError(f"diagram: a term is at {place!r}, which is no stage of the {role}")
    return places[role, name]


def _box(ax: Axes, centre, size, lines: list[str], colour: str, depth: float, dashed: bool = False) -> FancyBboxPatch:
    """A box with lines of text, the first bold; `depth` 0 to 1 darkens its ground."""
    (x, y), (width, height) = centre, size
    ground = [1 - 0.45 * depth**0.4 * (1 - part) if depth else 1 for part in to_rgb(colour)]
    box = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=1",
        facecolor=ground, edgecolor=colour, linewidth=0.8, linestyle="--" if dashed else "-", zorder=4,
    )  # fmt: skip
    ax.add_patch(box)
    look = dict(ha="center", va="center_baseline", fontsize=6.5, zorder=5)
    for i, line in enumerate(lines):
        ax.text(x, y + 2.85 * ((len(lines) - 1) / 2 - i), line, weight="normal" if i else "bold", **look)
    return box


def _centre(box: FancyBboxPatch) -> tuple[float, float]:
    return box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2


def _arrow(
    ax: Axes, start: FancyBboxPatch, end: FancyBboxPatch, colour: str, width: float = 0.9, stroke: str = "-"
) -> None:
    """From the edge of one box to the edge of another."""
    look = dict(arrowstyle="-|>", color=colour, linewidth=width, linestyle=stroke, mutation_scale=6)
    look |= dict(patchA=start, patchB=end, shrinkA=0, shrinkB=0)
    ax.annotate("", _centre(end), _centre(start), arrowprops=look, zorder=2)


def _share(stride: float) -> str:
    return f"1/{stride:.0f}"


def _short(number: float) -> str:
    """1234567 as 1.23 M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{number:.0f}"
