"""Runs, where they are kept, and the experiments that ask for them."""

# ruff: noqa: F401
from kdlib.experiments.designs import (
    EXPERIMENTS,
    ablation,
    agreement_runs,
    baseline,
    capacity,
    controls_and_agreement,
    correction,
    dimensions,
    distillation,
    external_network,
    label_fractions,
    loss_comparison,
    negative_controls,
    of_volumes,
    requested_runs,
    sweep,
    training_length,
)
from kdlib.experiments.setting import Setting
