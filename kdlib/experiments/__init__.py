"""The experiments: each is a function from a `Setting` to its list of runs, which `kdlib.study` trains."""

from kdlib.experiments.designs import (
    EXPERIMENTS,
    Setting,
    ablation,
    baseline,
    controls,
    correction,
    distillation,
    external_network,
    loss_comparison,
    requested_runs,
)

__all__ = [
    "EXPERIMENTS", "Setting", "ablation", "baseline", "controls", "correction", "distillation", "external_network",
    "loss_comparison", "requested_runs",
]  # fmt: skip
