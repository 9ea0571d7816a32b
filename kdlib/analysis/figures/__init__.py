"""One function a figure: tidy tables in, a matplotlib Figure out, in one style and at printed size.

Every figure carries a note on n and its intervals as its label, which `save_figure` writes after the caption.
"""

from kdlib.analysis.figures.comparisons import ablation, ranking, waterfall
from kdlib.analysis.figures.diagram import diagram
from kdlib.analysis.figures.pictures import features, pairs, qualitative, slice_montage
from kdlib.analysis.figures.results import (
    choose_cases,
    dice_against_parameters,
    dice_per_method,
    efficiency,
    failure,
    fidelity,
    reliability,
    slopes,
)
from kdlib.analysis.figures.style import (
    DOUBLE,
    FAMILY_OF,
    METHOD_COLOURS,
    METHOD_MARKERS,
    SINGLE,
    method_style,
    save_figure,
)
from kdlib.analysis.figures.training import gradient_diagnostics, gradient_shares, training_curves

__all__ = [
    "DOUBLE",
    "FAMILY_OF",
    "METHOD_COLOURS",
    "METHOD_MARKERS",
    "SINGLE",
    "ablation",
    "choose_cases",
    "dice_against_parameters",
    "diagram",
    "dice_per_method",
    "efficiency",
    "failure",
    "features",
    "fidelity",
    "gradient_shares",
    "gradient_diagnostics",
    "method_style",
    "pairs",
    "qualitative",
    "ranking",
    "reliability",
    "save_figure",
    "slice_montage",
    "slopes",
    "training_curves",
    "waterfall",
]
