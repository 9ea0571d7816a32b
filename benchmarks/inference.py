"""What a student saves at work: the networks in PyTorch, ONNX Runtime and OpenVINO, by slice and from file to file.

    python benchmarks/inference.py --output inference.csv [--quick] [--models T1 T2 S1 S2 E1] [--size 256]

Each variant runs in a process of its own, one at a time; all are run in turns, `--rounds` times, so that a machine that
slows down slows all of them: trust the ratios. Weights are untrained, as time does not depend on them (int8's ranges
come from random slices). Variants: `published` (the teacher's forward pass with both decoders, as its code runs it),
`eager`, `compiled` and `bf16` (PyTorch without the reconstruction decoder), `onnx`, `openvino`, `openvino-int8`.

One row per model, variant and task (slice, or volume from file to file). Times are in ms: `p50`, `p95`, of a volume
also `model_p50` (the network alone); `peak_mb` is the process's largest memory, `file_mb` the weights. A task is
repeated for `--seconds` in a round, at least once; a volume that would take longer than `--longest` has no row.

    python benchmarks/inference.py --draw inference.csv --cases results/hippocampus/tables/02_distillation_cases.csv.gz

draws Dice over latency from such a table and a study's table of cases, beside the first. Dice is that of float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from kdlib.analysis.figures import style
from kdlib.analysis.tables import summarise
from kdlib.config import TEACHERS, Preprocessing
from kdlib.inference.backends import load_backend, load_network
from kdlib.inference.export import openvino_model, quantise, save_onnx
from kdlib.inference.predict import mask_of, segment
from kdlib.inference.scans import read_scan, save
from kdlib.inference.student import Student, load_student, write_student
from kdlib.models import build_model, count_parameters
from kdlib.training.checkpoint import save_tensors
from kdlib.training.device import computes_bf16

TORCH = ("published", "eager", "compiled", "bf16")
EXPORTED = ("onnx", "openvino", "openvino-int8")
SPACING = 1.5  # mm of the slices, as in the profile `thesis`


def prepare(folder: Path, name: str, width: float, size: int) -> None:
    """The folders of one model, one per format: `<folder>/<name>-<format>`."""
    torch.manual_seed(0)
    model = build_model(name, width=width).eval()
    student = Student(name, name, width, ("spleen",), "CT", Preprocessing(size, SPACING))

    def put(format: str, make) -> None:
        write_student(replace(student, format=format), folder / f"{name}-{format}", make)

    def save_openvino(model):
        import openvino

        return lambda made: openvino.save_model(model, made / "model.xml", compress_to_fp16=False)

    put("torch", lambda made: save_tensors(model.state_dict(), made / "model.safetensors"))
    put("onnx", lambda made: save_onnx(model, student, made))
    exact = openvino_model(model, student)
    put("openvino", save_openvino(exact))
    put("openvino-int8", save_openvino(quantise(exact, list(torch.rand(4, 3, size, size).split(1)))))


def backend_of(folder: Path, variant: str):
    """The network as a function of slices [B,3,H,W]."""
    student = load_student(folder)
    if variant in ("eager", *EXPORTED):
        return student, load_backend(folder, student, "cpu")
    network = load_network(folder, student)
    if variant != "published":
        network = network.to(memory_format=torch.channels_last)
    forward = torch.compile(network) if variant == "compiled" else network

    def run(images: torch.Tensor) -> torch.Tensor:
        if variant != "published":
            images = images.to(memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=variant == "bf16"):
            return forward(images, reconstruct=variant == "published").segmentation.float()

    return student, run


def work(folder: Path, variant: str, scan: Path, options: argparse.Namespace) -> dict:
    """Seconds of each slice and of each volume, in this process."""
    torch.set_num_threads(os.cpu_count() or 1)
    student, backend = backend_of(folder, variant)
    image, inside, found = torch.rand(1, 3, options.size, options.size), [], {"slice": [], "volume": [], "model": []}

    def timed(images: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        logits = backend(images)
        inside.append(time.perf_counter() - begin)
        return logits

    def volume() -> None:
        read = read_scan(scan)
        save(
            scan.with_name(f"mask-{os.getpid()}.nii.gz"),
            mask_of(segment(student, timed, read, options.batch), student, read),
        )

    def repeat(task: str, function, most: int) -> None:
        end = time.perf_counter() + options.seconds
        while not found[task] or (len(found[task]) < most and time.perf_counter() < end):
            inside.clear()
            begin = time.perf_counter()
            function()
            found[task].append(time.perf_counter() - begin)
            if task == "volume":
                found["model"].append(sum(inside))

    timed(image)  # warm-up: memory, compilation
    repeat("slice", lambda: timed(image), options.repeats * 5)
    if min(found["slice"]) * options.slices <= options.longest:
        timed(image.expand(options.batch, -1, -1, -1))
        repeat("volume", volume, options.repeats)
    # not of getrusage: its largest memory begins with that of the process that started this one
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return found | {"peak_mb": int(status["VmHWM"].split()[0]) / 1024}


def volume_file(path: Path, size: int, slices: int) -> None:
    """A body of water in air, with noise: intensities of a CT, int16 and compressed, as scans come."""
    generator = np.random.default_rng(0)
    rows, columns = np.indices((size, size)) - size / 2
    body = np.where(rows**2 + columns**2 < (0.4 * size) ** 2, 40, -1000)[..., None]
    voxels = (body + generator.normal(0, 20, (size, size, slices))).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([SPACING, SPACING, 3, 1])), path)


def draw(times: pd.DataFrame, cases: pd.DataFrame) -> Figure:
    """Dice of networks trained on all labels over the median latency of a slice, a mark for each way to run them.

    Args:
        times: the rows of this benchmark.
        cases: a study's table of cases, with `role`, `fraction` and `model`.
    """
    means = summarise(cases[cases["role"].isin(["teacher", "baseline"]) & (cases["fraction"] == 1)]).set_index("model")
    marks = dict(zip(("published", *TORCH[1:], *EXPORTED), "Xosd^vP", strict=True))
    slices = times[times["task"] == "slice"].set_index("variant")
    with plt.rc_context(style.STYLE):
        figure, ax = plt.subplots(figsize=(style.DOUBLE, 80 * style.MM))
        for number, (name, rows) in enumerate(means.iterrows()):
            colour, found = f"C{number}", slices[slices["model"] == name]
            fastest = found["p50"].min()
            spread = [[rows["mean"] - rows["low"]], [rows["high"] - rows["mean"]]]
            ax.errorbar(fastest, rows["mean"], yerr=spread, color=colour, elinewidth=0.8)
            ax.plot(found["p50"], [rows["mean"]] * len(found), color=colour, linewidth=0.8)
            for variant, row in found.iterrows():
                ax.plot(row["p50"], rows["mean"], marks[variant], color=colour, markersize=6)
            place = dict(xytext=(-4, 4), textcoords="offset points", ha="right", color=colour)
            box = dict(facecolor="white", edgecolor="none", pad=0.5)
            ax.annotate(name, (fastest, rows["mean"]), bbox=box, **place)
        style.log_axis(ax.xaxis, slices["p50"].min() / 2, slices["p50"].max() * 1.3)
        ax.set(xlabel=f"ms per slice of {times['size'].iloc[0]} x {times['size'].iloc[0]}", ylabel="Dice")
        looks = {name: dict(color=style.DARK, marker=mark) for name, mark in marks.items() if name in slices.index}
        style.legend_below(figure, style.legend_lines(looks, **style.NO_LINE), columns=7)
    note = (
        f"Median latency on {times['threads'].iloc[0]} threads, batch of 1. Points and bars: {style.mean_text(means)}"
    )
    figure.set_label(f"{note}, in float32 and at the study's own size.")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("inference.csv"))
    parser.add_argument("--quick", action="store_true", help="to see it run: small, once; no number of it is of use")
    parser.add_argument("--models", nargs="+", default=["T1", "T2", "S1", "S2", "E1"])
    parser.add_argument("--width", type=float, default=1.0, help="of the teachers")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--slices", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="slices of a volume that pass the network at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=4, help="volumes per round, and a fifth of the slices")
    parser.add_argument("--seconds", type=float, default=10, help="of a task in a round, at least one repeat")
    parser.add_argument("--longest", type=float, default=60, help="seconds of a volume; none is measured beyond")
    parser.add_argument("--draw", type=Path, help="a table of this benchmark, to draw instead of measuring")
    parser.add_argument("--cases", type=Path, help="the study's table of cases for --draw")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # folder, variant, scan
    options = parser.parse_args()
    if options.draw:
        saved = draw(pd.read_csv(options.draw), pd.read_csv(options.cases))
        style.save_figure(saved, options.draw.parent, "inference", "Dice over latency.")
        return
    if options.worker:
        folder, variant, scan = options.worker
        work_of = work(Path(folder), variant, Path(scan), options)
        print(json.dumps(work_of))
        return
    if options.quick:
        options.size, options.slices, options.rounds, options.repeats, options.width = 64, 4, 1, 1, 0.125
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        volume_file(folder / "scan.nii.gz", options.size, options.slices)
        variants = []
        for name in options.models:
            print(f"{name}: exporting", flush=True)
            prepare(folder, name, options.width if name in TEACHERS else 1.0, options.size)
            wanted = {"published": name in TEACHERS, "bf16": computes_bf16(torch.device("cpu"))}
            variants += [(name, variant) for variant in (*TORCH, *EXPORTED) if wanted.get(variant, True)]
        found: dict[tuple[str, str], list[dict]] = {}
        for number in range(options.rounds):
            for name, variant in variants:
                print(f"round {number + 1} of {options.rounds}: {name} {variant}", flush=True)
                at = folder / f"{name}-{variant if variant in EXPORTED else 'torch'}"
                words = ["--worker", at, variant, folder / "scan.nii.gz", "--size", options.size]
                words += ["--slices", options.slices]
                words += ["--repeats", options.repeats, "--batch", options.batch]
                words += ["--seconds", options.seconds, "--longest", options.longest]
                done = subprocess.run([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True)
                if done.returncode == 0:  # a variant that this machine cannot run has no row
                    found.setdefault((name, variant), []).append(json.loads(done.stdout.splitlines()[-1]))
        table = pd.DataFrame([row for key, rounds in found.items() for row in rows(folder, *key, rounds, options)])
    table.to_csv(options.output, index=False)
    print(table.round(2).to_string(index=False))


def rows(folder: Path, name: str, variant: str, rounds: list[dict], options: argparse.Namespace) -> list[dict]:
    """The rows of one variant: one per task."""
    at = folder / f"{name}-{variant if variant in EXPORTED else 'torch'}"
    student, made = load_student(at), []
    network = build_model(student.model, width=student.width)
    for task in ("slice", "volume") if any(each["volume"] for each in rounds) else ("slice",):
        times = 1000 * np.concatenate([each[task] for each in rounds])
        p50, p95 = np.percentile(times, [50, 95])
        inside = 1000 * np.median(np.concatenate([each["model"] for each in rounds])) if task == "volume" else p50
        made.append({
            "model": name, "variant": variant, "task": task, "p50": p50, "p95": p95, "model_p50": inside,
            "peak_mb": max(each["peak_mb"] for each in rounds),
            "file_mb": sum((at / file).stat().st_size for file in student.files) / 2**20,
            "parameters": count_parameters(network), "size": options.size,
            "slices": options.slices if task == "volume" else 1, "batch": options.batch if task == "volume" else 1,
            "times": len(times), "threads": os.cpu_count(), "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        })  # fmt: skip
    return made


if __name__ == "__main__":
    main()
