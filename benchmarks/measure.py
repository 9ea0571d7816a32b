"""What every benchmark shares: repeats in turns, probes of the machine, rows with their goals, and the files of both.

A row is one claim: kdlib's way and another way of doing the same, measured in turns in one process, so that a machine
that slows down slows both. Trust the ratios; a number in seconds is that of one machine on one day.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

REPEATS = 5
NO_BF16 = "not measured: no bf16 here"
NO_GPU = "not measured: no GPU here"


@dataclass(frozen=True)
class Row:
    """One claim.

    Args:
        name: what is measured, with the sizes it is measured at; it begins with the number of its goal in the issue.
        value, other: medians of kdlib's way and of the other, in `unit`; None where not measured.
        ratio: other / value, or of a share value / other.
        goal: in words, "" for a row that only informs.
        holds: True, False, "" without a goal, or why it is not known ("not measured: ...").
    """

    name: str
    value: float | None = None
    unit: str = "s"
    other: float | None = None
    ratio: float | None = None
    goal: str = ""
    holds: bool | str = ""


def faster(name: str, value: float, other: float, least: float | None = None, unit: str = "s") -> Row:
    """kdlib's way takes `value`, the other way `other`: at least `least` times as much is the goal."""
    ratio = other / value
    goal = f"at least {least:g} times" if least else ""
    return Row(name, value, unit, other, ratio, goal, ratio >= least if least else "")


def share(name: str, value: float, of: float, most: float | None = None, unit: str = "s") -> Row:
    """`value` is a part, or a multiple, of `of`: at most `most` times it is the goal."""
    ratio = value / of
    goal = f"at most {most:g} times" if most else ""
    return Row(name, value, unit, of, ratio, goal, ratio <= most if most else "")


def within(name: str, value: float, most: float | None = None, unit: str = "s") -> Row:
    """A number alone: at most `most` is the goal."""
    goal = f"at most {most:g} {unit}" if most else ""
    return Row(name, value, unit, None, None, goal, value <= most if most else "")


def unmeasured(name: str, goal: str, why: str) -> Row:
    return Row(name, goal=goal, holds=why)


# ---------------------------------------------------------------------------------------------------------------- time


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of one thread of a CPU its own time: what else runs on the core does not count."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    synchronise(device)
    begin = clock()
    function()
    synchronise(device)
    return clock() - begin


def in_turns(
    variants: Mapping[str, Callable[[], object]], device: torch.device, repeats: int = REPEATS
) -> dict[str, float]:
    """Median seconds of each variant: one pass of each to warm up, then `repeats` rounds of all of them."""
    for function in variants.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, function in variants.items():
            times[name].append(seconds(function, device))
    return {name: statistics.median(found) for name, found in times.items()}


# -------------------------------------------------------------------------------------------------------------- probes


def probes(device: torch.device, repeats: int = REPEATS) -> dict[str, float]:
    """What the machine can do: matrix products in TFLOP/s, memory traffic in GB/s (read and written, each counted)."""
    side, count = (1024, 2**25) if device.type == "cpu" else (8192, 2**28)
    found = {}
    for name, dtype in {"float32": torch.float32, "bf16": torch.bfloat16}.items():
        if name == "bf16" and not has_bf16(device):
            continue
        a, b, out = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(3))
        taken = in_turns({"product": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, device, repeats)
        found[f"{name} matrix products, TFLOP/s"] = 2 * side**3 / taken["product"] / 1e12
    source, target = torch.rand(count, device=device), torch.empty(count, device=device)
    taken = in_turns({"copy": lambda: target.copy_(source)}, device, repeats)
    found["memory bandwidth, GB/s"] = 2 * 4 * count / taken["copy"] / 1e9
    return found


def has_bf16(device: torch.device) -> bool:
    from kdlib.training.device import computes_bf16

    return computes_bf16(device)


def machine(device: torch.device) -> dict[str, object]:
    """What the numbers are of."""
    from kdlib.experiments.store import git_state, machine

    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    return machine() | {"platform": platform.platform(), "date": time.strftime("%Y-%m-%d")} | gpu | git_state()


def device_name(device: torch.device) -> str:
    """The name of the files of this device, e.g. "nvidia-h100-80gb-hbm3" or "cpu-amd-epyc-7763"."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        from kdlib.experiments.store import machine

        name = "cpu-" + re.sub(r"\([^)]*\)|@.*|processor|CPU|\d+-Core", "", str(machine()["hardware"]["cpu"]))
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


# ------------------------------------------------------------------------------------------------------------- records


class Record:
    """The rows and curves of one device, which every script adds to: `<folder>/<device>.json`, `.md` and `.png`.

    A script that is run again replaces its own rows and curves.

    Args:
        folder: of the files; made where it is missing.
        device: that is measured.
        quick: whether sizes are those of a trial, of which no number is of use; it is written into the files.
    """

    def __init__(self, folder: Path, device: torch.device, quick: bool = False):
        self.device, self.quick = device, quick
        self.path = folder / f"{device_name(device)}{'-quick' if quick else ''}.json"
        self.scripts: dict[str, dict] = {}
        if self.path.is_file():
            self.scripts = json.loads(self.path.read_text(encoding="utf-8"))["scripts"]
        self.begin = time.perf_counter()

    def start(self, script: str) -> None:
        """The rows that follow are of this script."""
        from kdlib.training.device import keep_freed_memory

        keep_freed_memory()  # as in a training
        self.script = script
        self.scripts[script] = {"machine": machine(self.device), "rows": [], "curves": []}
        self.say(f"{script}: {torch.get_num_threads()} threads, torch {torch.__version__}")

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begin:5.0f} s] {text}", flush=True)

    def add(self, row: Row) -> None:
        self.scripts[self.script]["rows"].append(asdict(row))
        self.say(in_words(row))

    def curve(self, name: str, x: str, points: Iterable[tuple[str, float, float]]) -> None:
        """How a cost grows: points (variant, x, seconds)."""
        points = [dict(variant=variant, x=at, seconds=taken) for variant, at, taken in points]
        self.scripts[self.script]["curves"].append(dict(name=name, x=x, points=points))
        for point in points:
            self.say(f"curve {name}: {point['variant']}, {x} {point['x']:g}: {1000 * point['seconds']:.1f} ms")

    def note(self, name: str, values: object) -> None:
        """Facts of a script beside its rows, e.g. what the machine can do."""
        self.scripts[self.script][name] = values

    def write(self) -> None:
        """Writes what there is: after every script, so that a stopped run keeps what it measured."""
        from kdlib.files import write_text

        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"quick": self.quick, "scripts": self.scripts}, indent=1)
        write_text(self.path, text + "\n")
        write_text(self.path.with_suffix(".md"), table(self.scripts, self.quick))
        draw(self.scripts, self.path.with_suffix(".png"))


def in_words(row: Row) -> str:
    numbers = "" if row.value is None else f"{row.value:.4g} {row.unit}"
    numbers += "" if row.other is None else f", other {row.other:.4g} {row.unit}, ratio {row.ratio:.2f}"
    said = {True: "holds", False: "DOES NOT HOLD"}.get(row.holds, row.holds)
    goal = "; ".join(filter(None, [row.goal, said]))
    return f"{row.name}: {numbers}{f' ({goal})' if goal else ''}"


def table(scripts: Mapping[str, Mapping], quick: bool) -> str:
    """The rows of all scripts as Markdown."""
    lines = ["# Benchmarks", ""]
    if quick:
        lines += ["A trial of the scripts at tiny sizes: no number here is of use.", ""]
    for script, found in scripts.items():
        where = found["machine"]
        what = where.get("gpu") or f"{where['hardware']['cpu']}, {where['threads']} threads"
        lines += [f"## {script}", "", f"{what}, PyTorch {where['versions']['torch']}, {where['date']}"]
        lines += [f"{name}: {value:.3g}" for name, value in found.get("probes", {}).items()]
        lines += ["", "| name | value | unit | other | ratio | goal | holds |", "|---|---|---|---|---|---|---|"]
        for row in found["rows"]:
            numbers = ["" if row[key] is None else f"{row[key]:.4g}" for key in ("value", "other", "ratio")]
            value, other, ratio = numbers
            holds = {True: "yes", False: "**no**"}.get(row["holds"], row["holds"])
            lines.append(f"| {row['name']} | {value} | {row['unit']} | {other} | {ratio} | {row['goal']} | {holds} |")
        lines.append("")
        for curve in found["curves"]:
            names = list(dict.fromkeys(point["variant"] for point in curve["points"]))
            lines += [
                f"{curve['name']}, ms",
                "",
                f"| {curve['x']} | {' | '.join(names)} |",
                "|---" * (1 + len(names)) + "|",
            ]
            for at in sorted({point["x"] for point in curve["points"]}):
                taken = {p["variant"]: f"{1000 * p['seconds']:.1f}" for p in curve["points"] if p["x"] == at}
                lines.append(f"| {at:g} | {' | '.join(taken.get(name, '') for name in names)} |")
            lines.append("")
    return "\n".join(lines)


def draw(scripts: Mapping[str, Mapping], path: Path) -> None:
    """The curves of all scripts, each on logarithmic axes of its own: a cost that grows in proportion has slope 1."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    curves = [curve for found in scripts.values() for curve in found["curves"]]
    if not curves:
        return
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.8 * rows), layout="constrained")
    for axes, curve in zip(figure.subplots(rows, columns, squeeze=False).flat, curves, strict=False):
        for name in dict.fromkeys(point["variant"] for point in curve["points"]):
            points = [(point["x"], 1000 * point["seconds"]) for point in curve["points"] if point["variant"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(title=curve["name"], xlabel=curve["x"], ylabel="ms", xscale="log", yscale="log")
        measured = sorted({point["x"] for point in curve["points"]})
        axes.set_xticks(measured, [f"{x:g}" for x in measured])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)
    for axes in figure.axes[len(curves) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------------------- options


def options(text: str, **own: Mapping) -> argparse.Namespace:
    """The command line of a script: what all share, and its `own` further options (name -> of `add_argument`)."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see it run; no number of it is of use")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, help="of the CPU; all where not given")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"), help="folder of rows and table")
    for name, arguments in own.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **arguments)
    return parser.parse_args()


def run_alone(script: str, measure: Callable[[Record], None], text: str) -> None:
    """What a script does that is called by itself."""
    from kdlib.training.device import pick_device

    given = options(text)
    if given.threads:
        torch.set_num_threads(given.threads)
    record = Record(given.output, pick_device(given.device), given.quick)
    record.start(script)
    measure(record)
    record.write()


# ------------------------------------------------------------------------------------------------------------ equality


def difference(ours: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """How far two lists of tensors are apart: the norm of all differences relative to that of all values."""
    pairs = [(a.detach().double().cpu(), b.detach().double().cpu()) for a, b in zip(ours, others, strict=True)]
    apart, size = (
        sum(float(x.square().sum()) for x in xs) for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return math.sqrt(apart / size)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def must_agree(what: str, difference: float, most: float) -> None:
    """Stops a benchmark whose two ways do not compute the same.

    Raises: RuntimeError.
    """
    if not difference <= most:
        raise RuntimeError(f"{what}: the two ways differ by {difference:.2g}, more than {most:g}")
