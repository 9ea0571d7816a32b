"""One function a figure: tidy tables in, a matplotlib Figure out, in one style and at printed size.

Every figure carries a note on n and its intervals as its label, which `save_figure` writes after the caption.
"""

from kdlib.figures.comparisons import ablation, ranking, waterfall
from kdlib.figures.diagram import diagram
from kdlib.figures.pictures import features, pairs, qualitative, slice_montage
from kdlib.figures.results import (
    choose_cases,
    dice_against_parameters,
    dice_per_method,
    efficiency,
    failure,
    fidelity,
    reliability,
    slopes,
)
from kdlib.figures.style import (
    DOUBLE,
    FAMILY_OF,
    METHOD_COLOURS,
    METHOD_MARKERS,
    SINGLE,
    method_style,
    save_figure,
)
from kdlib.figures.training import gradient_shares, liveness, training_curves

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
    "liveness",
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
