"""The statistics of the study under one name: tidy tables of per-case metrics in, tables for readers out."""

# ruff: noqa: F401
from kdlib.analysis.comparisons import (
    ALPHA,
    COMPARISON_COLUMNS,
    baseline_pairs,
    compare,
    compare_classes,
    holm,
    image_pairs,
    minimum_detectable_difference,
    non_inferiority,
    paired,
    rank_biserial,
    ranks,
    term_effects,
)
from kdlib.analysis.convergence import convergence
from kdlib.analysis.correction import (
    gains,
    overlap_weights,
    paired_changes,
    paired_permutation,
    step_changes,
    withhold_stages,
)
from kdlib.analysis.intervals import interval, seed_noise
from kdlib.analysis.labels import method_labels
from kdlib.analysis.patients import per_patient
from kdlib.analysis.sentences import withhold
from kdlib.analysis.tables import (
    THESIS_COLUMNS,
    THESIS_TABLE,
    all_means,
    by_patient_table,
    gradient_diagnostics,
    pivot_thesis,
    save_table,
    summarise,
    to_latex,
)
