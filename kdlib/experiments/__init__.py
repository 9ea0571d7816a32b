"""Runs, where they are kept, and the experiments that ask for them."""

from kdlib.experiments.designs import (
    EXPERIMENTS,
    Setting,
    ablation,
    baseline,
    correction,
    distillation,
    label_fractions,
    loss_comparison,
    negative_controls,
    training_length,
)

__all__ = [
    "EXPERIMENTS",
    "Setting",
    "ablation",
    "baseline",
    "correction",
    "distillation",
    "label_fractions",
    "loss_comparison",
    "negative_controls",
    "training_length",
]
