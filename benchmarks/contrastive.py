"""Contrasts of all pixels, forward and backward, against the public losses and against the floor of the arithmetic.

    python benchmarks/contrastive.py [--quick] [--device cpu] [--sizes 1024 8192] [--dims 64]

Needs pytorch-metric-learning and info-nce-pytorch. N unit vectors of width d of a student, with gradient, against N of
a frozen teacher, at temperature 0.1; labels of 4 classes; on a CPU with one thread. "Dense" is the loss over all pairs
as Khosla 2020 (arXiv 2004.11362) writes it and its authors' code computes it. All ways of one size are timed in turns.
Memory is the peak above what was held before: on a CPU of a process that is forked before anything is timed. The floor
is 4 N^2 d floating-point operations in matrix products and N^2 exponentials, each at the best rate of several block
sizes, measured between the others. A way that gives another value or another norm of the gradient stops the script.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch
from info_nce import InfoNCE
from measure import NO_BF16, Record, faster, has_bf16, in_turns, options, seconds, share, synchronise, unmeasured
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor
from torch.nn import functional as F

from kdlib.losses import SupervisedContrastiveLoss
from kdlib.losses.linear import log_sum_exp
from kdlib.training.device import one_thread, pick_device

TEMPERATURE, CLASSES = 0.1, 4


# --- the ways: (student [n, d], teacher [n, d], labels [n]) -> loss ---------------------------------------------------


def supcon_kdlib(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    student, teacher = (x.T[None, :, :, None] for x in (student, teacher))  # one image of n x 1 pixels
    return SupervisedContrastiveLoss(TEMPERATURE, samples=None)(student, teacher, labels[None, :, None])


def supcon_dense(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    logits = F.normalize(student) @ F.normalize(teacher).T / TEMPERATURE
    logits = logits - logits.max(1, keepdim=True).values.detach()
    positives = (labels[:, None] == labels).float()
    log_probability = logits - torch.exp(logits).sum(1, keepdim=True).log()
    return -((positives * log_probability).sum(1) / positives.sum(1)).mean()


def supcon_public(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    # a clone, because the very same labels mean the self-contrast, without the pairs (i, i)
    return SupConLoss(TEMPERATURE)(student, labels, ref_emb=teacher, ref_labels=labels.clone())


def infonce_kdlib(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    student, teacher = F.normalize(student), F.normalize(teacher)
    positive = (student * teacher).sum(1) / TEMPERATURE
    return (log_sum_exp(student, teacher, 1 / TEMPERATURE, unit=True) - positive).mean()


def infonce_dense(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    logits = F.normalize(student) @ F.normalize(teacher).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def infonce_public(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return InfoNCE(TEMPERATURE)(student, teacher)


WAYS: dict[str, dict[str, Callable]] = {
    "supervised contrast": {
        "kdlib": supcon_kdlib, "dense, as Khosla's": supcon_dense, "pytorch-metric-learning": supcon_public,
    },
    "InfoNCE": {"kdlib": infonce_kdlib, "dense": infonce_dense, "info-nce-pytorch": infonce_public},
}  # fmt: skip
GOALS = {"pytorch-metric-learning": 20, "dense, as Khosla's": 8, "info-nce-pytorch": 4}
WITH_BF16 = {"supervised contrast": 12, "InfoNCE": 6}


def inputs(n: int, dims: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (F.normalize(torch.randn(n, dims, generator=generator)).to(device) for _ in range(2))
    return student.requires_grad_(), teacher, torch.arange(n, device=device) % CLASSES


def step(way: Callable, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    student.grad = None
    value = way(student, teacher, labels)
    value.backward()
    return value


# --- memory -----------------------------------------------------------------------------------------------------------


def peak(device: torch.device, reset: bool = False) -> int:
    """Highest memory so far in bytes; `reset` starts anew from what is held now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def extra_memory(way: Callable, n: int, dims: int, device: torch.device) -> int:
    """Bytes that a step needs beside its inputs."""
    step(way, *inputs(min(n, 256), dims, device))  # buffers of libraries are there by now
    given = inputs(n, dims, device)
    synchronise(device)
    before = peak(device, reset=True)
    step(way, *given)
    synchronise(device)
    return peak(device) - before


def _send(pipe, loss: str, name: str, n: int, dims: int) -> None:
    torch.set_num_threads(1)
    pipe.send(extra_memory(WAYS[loss][name], n, dims, torch.device("cpu")))


def memory(loss: str, name: str, n: int, dims: int, device: torch.device) -> int | None:
    """The same in a process of its own on a CPU; None where that ran out of memory, or is no Linux."""
    if device.type == "cuda":
        try:
            return extra_memory(WAYS[loss][name], n, dims, device)
        except torch.OutOfMemoryError:
            return None
    own, other = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "info_nce", "pytorch_metric_learning.losses", "kdlib.losses"]
    )  # once for all
    process = context.Process(target=_send, args=(other, loss, name, n, dims))
    process.start()
    other.close()
    try:
        return own.recv()
    except EOFError:
        return None
    finally:
        process.join()


# --- time -------------------------------------------------------------------------------------------------------------


def floor(n: int, dims: int, device: torch.device) -> float:
    """Seconds of the two matrix products and the exponentials of n x n pairs, each at its best block size."""
    best = [float("inf")] * 3
    for rows, columns in (
        [(256, 512), (512, 1024), (1024, 512)] if device.type == "cpu" else [(4096, 4096), (8192, 8192)]
    ):
        rows, columns = min(rows, n), min(columns, n)
        count = max(1, 2**23 // (rows * columns))
        queries, keys = torch.rand(rows, dims, device=device), torch.rand(columns, dims, device=device)
        source, pairs = (torch.rand(rows, columns, device=device) for _ in range(2))
        out = torch.empty(rows, dims, device=device)
        parts = [
            lambda q=queries, k=keys, p=pairs: torch.mm(q, k.T, out=p),
            lambda s=source, p=pairs: torch.exp(s, out=p),
            lambda q=out, k=keys, p=pairs: torch.mm(p, k, out=q),
        ]
        for i, part in enumerate(parts):
            part()
            taken = seconds(lambda part=part, count=count: [part() for _ in range(count)], device)
            best[i] = min(best[i], taken / count * n * n / (rows * columns))
    return sum(best)


def contrast(record: Record, loss: str, n: int, dims: int) -> list[tuple[str, float, float]]:
    """The rows of one loss at one size; returns the points of its curve."""
    device, what = record.device, f"7 {loss}, {n} pixels, d {dims}"
    largest = n == max(record.sizes)
    needed = {name: memory(loss, name, n, dims, device) if largest else 0 for name in WAYS[loss]}
    given = inputs(n, dims, device)
    found = {}
    for name in [name for name in WAYS[loss] if needed[name] is not None or device.type == "cpu"]:
        value = float(step(WAYS[loss][name], *given))
        found[name] = value, float(given[0].grad.double().norm())
        for ours, theirs in zip(found["kdlib"], found[name], strict=True):
            if abs(theirs / ours - 1) > 1e-4:
                raise RuntimeError(
                    f"{what}: {name} gives {found[name]}, kdlib {found['kdlib']} (value, norm of gradient)"
                )
    floors: list[float] = []
    variants = {name: lambda name=name: step(WAYS[loss][name], *given) for name in found}
    taken = in_turns(variants | {"floor": lambda: floors.append(floor(n, dims, device))}, device)
    for name in [name for name in found if name != "kdlib"]:
        goal = GOALS.get(name) if largest else None
        record.add(faster(f"{what}, against {name}", taken["kdlib"], taken[name], goal))
        if needed[name] and needed["kdlib"]:
            goal = 80 if goal else None
            mega = needed["kdlib"] / 1e6, needed[name] / 1e6
            record.add(faster(f"{what}, memory, against {name}", *mega, goal, "MB"))
    record.add(share(f"{what}, beside the floor", taken["kdlib"], sorted(floors)[len(floors) // 2], 1.25))
    return [(f"{loss}, {name}", n, taken[name]) for name in found]


def measure(record: Record, sizes: tuple[int, ...] = (1024, 2048, 4096, 8192), dims: tuple[int, ...] = (64,)) -> None:
    record.sizes = sizes = (256, 512) if record.quick else sizes
    with one_thread():
        for width in dims:
            points = [point for loss in WAYS for n in sizes for point in contrast(record, loss, n, width)]
            record.curve(f"contrast of pixels, d {width}", "pixels", points)
    for loss, goal in WITH_BF16.items():
        why = NO_BF16 if not has_bf16(record.device) else "not measured: products in bf16 are not written"
        record.add(unmeasured(f"7 {loss} with bf16 matrix products", f"at least {goal} times", why))


def main() -> None:
    sizes = dict(type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    given = options(__doc__, sizes=sizes, dims=dict(type=int, nargs="+", default=[64]))
    record = Record(given.output, pick_device(given.device), given.quick)
    record.start("contrastive")
    measure(record, tuple(given.sizes), tuple(given.dims))
    record.write()


if __name__ == "__main__":
    main()
