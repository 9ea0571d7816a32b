"""All benchmarks on the device that is there: `python benchmarks [--quick] [--only training ...]`, or `make bench`.

Writes `results/benchmarks/<device>.json` (rows of name, value, unit, other, ratio, goal, holds), a table `.md` and the
curves `.png`. What takes longer than a coffee, or needs a data set, is measured with `--long`: `inference.py` (networks
in other libraries; writes a CSV of its own) and, where `--data` names a folder, `convergence.py`.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import torch
from measure import Record, options, table

from kdlib.training.device import pick_device

SCRIPTS = ("training", "contrastive", "slices", "evaluation", "startup", "gpu_rows")
HERE = Path(__file__).parent


def main() -> int:
    own = dict(only=dict(nargs="+", default=list(SCRIPTS), choices=SCRIPTS, help="scripts to run"))
    own |= dict(long=dict(action="store_true", help="also what takes an hour"), data=dict(default="", help="folder"))
    given = options(__doc__, **own)
    if given.threads:
        torch.set_num_threads(given.threads)
    record = Record(given.output, pick_device(given.device), given.quick)
    for name in given.only:
        record.start(name)
        importlib.import_module(name).measure(record)
        record.write()
    failed = 0
    if given.long:
        quick = ["--quick"] * given.quick
        csv = record.path.with_name(f"{record.path.stem}-inference.csv")
        calls = [["inference.py", "--output", str(csv), *quick]]
        if given.data:
            calls.append(["convergence.py", "--data", given.data, "--output", str(given.output), *quick])
        for words in calls:
            failed += subprocess.run([sys.executable, str(HERE / words[0]), *words[1:]]).returncode != 0
        record = Record(given.output, record.device, given.quick)
    print("\n" + table(record.scripts, given.quick))
    print(f"{record.path.with_suffix('')}.json, .md, .png")
    return failed


if __name__ == "__main__":
    sys.exit(main())
