"""Contrasts of all pixels, forward and backward, against the public losses and against the floor of the arithmetic.

    python benchmarks/contrastive.py [--sizes 1024 4096 16384] [--dims 64 128] [--device cpu] [--threads 1]
                                     [--repeats 5]

Needs pytorch-metric-learning and info-nce-pytorch. N unit vectors of width d of a student, with gradient, against N of
a frozen teacher, at temperature 0.1; labels of 4 classes. Every
method runs in an interpreter of its own. Time is the median of the repeats (as many as fit into a minute), the
process's own time where it has one thread. Memory is the peak above what the process held with its inputs and after a
run of 256 vectors. The floor is 4 N^2 d floating-point operations in matrix products and N^2 exponentials, each at the
best rate of several block sizes, measured in the same process between the repeats. A peer that gives another value or
another norm of the gradient stops the script.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE, CLASSES = 0.1, 4
BUDGET = 60.0  # seconds of repeats


# --- the methods: (student [n, d], teacher [n, d], labels [n]) -> loss ------------------------------------------------


def labelled_kdlib(dims: int) -> Callable:
    from kdlib.losses import SupervisedContrastiveLoss

    term = SupervisedContrastiveLoss(TEMPERATURE, samples=None)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student, teacher = (x.T[None, :, :, None] for x in (student, teacher))  # one image of n x 1 pixels
        return term(student, teacher, labels[None, :, None])

    return loss


def labelled_dense(dims: int) -> Callable:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        logits = F.normalize(student) @ F.normalize(teacher).T / TEMPERATURE
        logits = logits - logits.max(1, keepdim=True).values.detach()
        positives = (labels[:, None] == labels).float()
        log_probability = logits - torch.exp(logits).sum(1, keepdim=True).log()
        return -((positives * log_probability).sum(1) / positives.sum(1)).mean()

    return loss


def labelled_pml(dims: int) -> Callable:
    from pytorch_metric_learning.losses import SupConLoss

    term = SupConLoss(TEMPERATURE)
    # a clone, because the very same labels mean the self-contrast, without the pairs (i, i)
    return lambda student, teacher, labels: term(student, labels, ref_emb=teacher, ref_labels=labels.clone())


def infonce_kdlib(dims: int) -> Callable:
    from kdlib.losses.linear import log_sum_exp

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student, teacher = F.normalize(student), F.normalize(teacher)
        positive = (student * teacher).sum(1) / TEMPERATURE
        return (log_sum_exp(student, teacher, 1 / TEMPERATURE, unit=True) - positive).mean()

    return loss


def infonce_dense(dims: int) -> Callable:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        logits = F.normalize(student) @ F.normalize(teacher).T / TEMPERATURE
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    return loss


def infonce_public(dims: int) -> Callable:
    from info_nce import InfoNCE

    term = InfoNCE(TEMPERATURE)
    return lambda student, teacher, labels: term(student, teacher)


METHODS = {
    "supcon": {
        "kdlib": labelled_kdlib,
        "plain dense torch": labelled_dense,
        "pytorch-metric-learning SupConLoss": labelled_pml,
    },
    "InfoNCE": {
        "kdlib": infonce_kdlib,
        "plain dense torch": infonce_dense,
        "info-nce-pytorch": infonce_public,
    },
}


# --- one method, in its own process -----------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak(device: str, reset: bool = False) -> int:
    """Highest memory so far in bytes; `reset` starts anew from what is held now."""
    if device != "cpu":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:  # not Linux: the peak cannot be reset, which can only understate what a method adds
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def inputs(n: int, dims: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (F.normalize(torch.randn(n, dims, generator=generator)).to(device) for _ in range(2))
    return student.requires_grad_(), teacher, torch.arange(n, device=device) % CLASSES


def seconds(function: Callable, device: str) -> float:
    # of one thread its own time: what else runs on the core does not count
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    synchronize(device)
    begin = clock()
    function()
    synchronize(device)
    return clock() - begin


def floor(n: int, dims: int, device: str) -> float:
    """Seconds of the two matrix products and the exponentials of n x n pairs, each at its best block size."""
    best = [float("inf")] * 3
    for rows, columns in [(256, 512), (512, 1024), (1024, 512)] if device == "cpu" else [(4096, 4096), (8192, 8192)]:
        rows, columns = min(rows, n), min(columns, n)
        count = max(1, 2**23 // (rows * columns))
        queries, keys = torch.rand(rows, dims, device=device), torch.rand(columns, dims, device=device)
        source, pairs = (torch.rand(rows, columns, device=device) for _ in range(2))
        out = torch.empty(rows, dims, device=device)
        steps = [
            lambda q=queries, k=keys, p=pairs: torch.mm(q, k.T, out=p),
            lambda s=source, p=pairs: torch.exp(s, out=p),
            lambda q=out, k=keys, p=pairs: torch.mm(p, k, out=q),
        ]
        for i, step in enumerate(steps):
            step()
            taken = seconds(lambda step=step, count=count: [step() for _ in range(count)], device)
            best[i] = min(best[i], taken / count * n * n / (rows * columns))
    return sum(best)


def child(loss: str, method: str, n: int, dims: int, device: str, threads: int, repeats: int) -> dict:
    torch.set_num_threads(threads)
    function = METHODS[loss][method](dims)

    def step(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student.grad = None
        value = function(student, teacher, labels)
        value.backward()
        return value

    step(*inputs(min(n, 256), dims, device))  # libraries and their buffers are loaded by now
    given = inputs(n, dims, device)
    synchronize(device)
    before = peak(device, reset=True)
    value, floors = float(step(*given).detach()), []
    synchronize(device)
    extra = peak(device) - before
    times, begin = [], time.perf_counter()
    while not times or (len(times) < repeats and time.perf_counter() - begin < BUDGET):
        times.append(seconds(lambda: step(*given), device))
        if method == "kdlib":
            floors.append(floor(n, dims, device))
    return {
        "seconds": statistics.median(times),
        "repeats": len(times),
        "bytes": extra,
        "value": value,
        "gradient": float(given[0].grad.double().norm()),
        "floor": statistics.median(floors) if floors else None,
    }


# --- the table --------------------------------------------------------------------------------------------------------


def measure(loss: str, method: str, options: argparse.Namespace, n: int, dims: int) -> dict | None:
    """The numbers of one method from a fresh interpreter; None where it ran out of memory."""
    arguments = [loss, method, n, dims, options.device, options.threads, options.repeats]
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == -9 or "memory" in done.stderr.lower():
        return None
    raise RuntimeError(f"{loss}, {method}, N {n}, d {dims}:\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*json.loads(options.child))))
        return
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads")
    print(f"{'':44}{'time, s':>10}{'repeats':>9}{'extra MB':>10}{'slower':>9}{'memory':>9}{'/ floor':>9}")
    for loss, methods in METHODS.items():
        for n in options.sizes:
            for dims in options.dims:
                print(f"{loss}, N {n}, d {dims}")
                ours = measure(loss, "kdlib", options, n, dims)
                for method in methods:
                    found = ours if method == "kdlib" else measure(loss, method, options, n, dims)
                    if found is None:
                        print(f"  {method:42}{'out of memory':>19}", flush=True)
                        continue
                    for quantity in ("value", "gradient"):
                        if abs(found[quantity] / ours[quantity] - 1) > 1e-4:
                            raise RuntimeError(f"{method}: {quantity} {found[quantity]}, kdlib {ours[quantity]}")
                    line = f"  {method:42}{found['seconds']:10.4f}{found['repeats']:9}{found['bytes'] / 1e6:10.1f}"
                    if method == "kdlib":
                        line += f"{'':18}{ours['seconds'] / ours['floor']:9.2f}"
                    else:
                        line += f"{found['seconds'] / ours['seconds']:9.1f}"
                        line += f"{found['bytes'] / max(ours['bytes'], 1):9.0f}"
                    print(line, flush=True)


if __name__ == "__main__":
    main()
