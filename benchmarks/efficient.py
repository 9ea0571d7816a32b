"""A search for E1: candidates of S1's budget under one training, judged on the validation patients of one fold.

    python benchmarks/efficient.py DATA [--target spleen] [--profile ct96] [--steps 400] [--results FOLDER]

Prints the cost and validation Dice of each; docs/efficient_student.md has the numbers of the first search. The test
patients are evaluated too, as of every run, but not printed, so that they choose nothing.
"""

from __future__ import annotations

import argparse
from functools import partial

import pandas as pd

import kdlib
from kdlib.models import MODELS, cost
from kdlib.models.efficient import EfficientUNet

CANDIDATES = {
    "E1": {},  # as registered
    "3x3 kernels": dict(widths=(16, 24, 32, 48, 72), blocks=(0, 1, 1, 2, 3), kernel=3),
    "7x7 kernels": dict(widths=(16, 24, 32, 48, 72), blocks=(0, 1, 1, 2, 2), kernel=7),
    "wide above": dict(widths=(16, 32, 48, 64, 64), blocks=(0, 1, 1, 1, 2)),
    "deep below": dict(widths=(16, 24, 32, 48, 64), blocks=(0, 1, 2, 3, 3)),
    "S1": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--target", default="spleen")
    parser.add_argument("--profile", default="ct96")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--results", default="results/e1-search")
    options = parser.parse_args()
    for name, arguments in CANDIDATES.items():
        if arguments:
            MODELS[name] = partial(EfficientUNet, **arguments)
    setting = kdlib.Setting(
        data=options.data,
        target=options.target,
        profile=options.profile,
        changes={"student_epochs": 5, "student_steps": options.steps // 5},
        results=options.results,
    )
    results = kdlib.study([setting.run(model=name) for name in CANDIDATES], setting.results)
    dice = results.history.query("name == 'val_dice'").groupby("model")["value"].last().rename("validation_dice")
    costs = cost(setting.sized.width, setting.sized.preprocessing.size, models=tuple(CANDIDATES))
    table = costs[costs["size"] == "thesis"].set_index("model")[["parameters", "gflops", "latency_ms"]]
    print(pd.concat([table, dice], axis=1).loc[list(CANDIDATES)].round(3).to_string())


if __name__ == "__main__":
    main()
