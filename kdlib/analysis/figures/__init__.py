"""One function per figure: tables or arrays in, a matplotlib Figure out, in one style and at printed size.

A figure of results has a note on n and its intervals as its label, which `save_figure` writes after the caption.
"""

# ruff: noqa: F401
from kdlib.analysis.figures.capacity import capacity, dimensions
from kdlib.analysis.figures.comparisons import by_class, cumulative_correction, forest, when
from kdlib.analysis.figures.failure import failure
from kdlib.analysis.figures.pictures import features, overview, pairs, qualitative, slice_montage, step
from kdlib.analysis.figures.results import (
    along,
    choose_cases,
    dice_per_method,
    efficiency,
    reliability,
    teacher_agreement,
)
from kdlib.analysis.figures.style import DOUBLE, SINGLE, method_styles, save_figure
from kdlib.analysis.figures.training import gradient_diagnostics, learning_curves
