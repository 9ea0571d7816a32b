"""The log-sum-exp of a contrast over all pairs, exactly, in memory linear in the number of vectors.

Only a block of the pairs exists at a time. The gradient with respect to the queries, `softmax(q K^T) K`, is an
attention output, and is made in the forward pass beside the sums (the blocks of Dao 2022, arXiv 2205.14135, in plain
torch): where the keys need no gradient, nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdlib.losses.base import as_float

BLOCKS = {"cpu": (1024, 512)}  # queries and keys of a block: it stays in a CPU's cache
LARGE_BLOCKS = (4096, 4096)  # other devices want few large launches
SAFE = 60.0  # exponentials of +-60 and sums of 1e12 of them are far inside single precision: no maximum is needed


def log_sum_exp(
    queries: Tensor, keys: Tensor, scale: float, query_groups: Tensor | None = None, key_groups: Tensor | None = None,
    unit: bool = False,
) -> Tensor:  # fmt: skip
    """`log sum_j exp(scale * q_i . k_j)` of every query, computed in at least single precision.

    4 n m d floating-point operations forward, gradient of the queries included; as many again backward where the keys
    need a gradient, else none of that order. First derivatives only.

    Args:
        queries: [n, d].
        keys: [m, d].
        scale: of the products, 1 / temperature.
        query_groups, key_groups: [n] and [m] int64. A key of the query's own group is left out, except that of the
            query's own position: key i of query i. (Two slices of one patient are near copies.)
        unit: no vector is longer than 1, so that a moderate scale needs no search for the largest product.

    Returns: [n]; -inf for a query that is left without a key.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = as_float(queries), as_float(keys)
        bounded = unit and scale <= SAFE
        if query_groups is None:
            return _LogSumExp.apply(queries, keys, scale, bounded)
        result = queries.new_zeros(len(queries))
        for group in query_groups.unique():
            # one product of the group with all other keys: no mask of all pairs, and less work
            members = (query_groups == group).nonzero()[:, 0]
            others = (key_groups != group).nonzero()[:, 0]
            own = scale * (queries[members] * keys[members]).sum(1)
            other = _LogSumExp.apply(queries[members], keys[others], scale, bounded)
            result = result.index_put((members,), torch.logaddexp(own, other))
        return result


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, length)) for begin in range(0, length, size))


class _Sums:
    """Running `sum exp(products)` of some rows as `total * exp(shift)`, with the weighted sum of the keys if wanted."""

    def __init__(self, like: Tensor, bounded: bool, weighted: bool = False):
        self.bounded = bounded
        self.total = like.new_zeros(len(like))
        self.shift = like.new_full((len(like),), 0.0 if bounded else -torch.inf)
        self.weighted = torch.zeros_like(like) if weighted else None

    def add(self, products: Tensor, keys: Tensor) -> None:
        """Takes in a block [rows, keys]; it is overwritten by its exponentials."""
        if not self.bounded:
            shift = torch.maximum(self.shift, products.amax(1))
            shrink = torch.exp(self.shift - shift)
            self.total *= shrink
            if self.weighted is not None:
                self.weighted *= shrink[:, None]
            products -= shift[:, None]
            self.shift = shift
        exponentials = products.exp_()
        self.total += exponentials.sum(1)
        if self.weighted is not None:
            self.weighted.addmm_(exponentials, keys)

    def log(self) -> Tensor:
        return self.total.log() + self.shift


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, scale: float, bounded: bool) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        result = queries.new_empty(len(queries))
        means = torch.empty_like(queries) if wanted else None  # of the keys, as each query weighs them
        rows_size, keys_size = BLOCKS.get(queries.device.type, LARGE_BLOCKS)
        for rows in _blocks(len(queries), rows_size):
            scaled = queries[rows] * scale
            sums = _Sums(scaled, bounded, wanted)
            for columns in _blocks(len(keys), keys_size):
                sums.add(scaled @ keys[columns].T, keys[columns])
            result[rows] = sums.log()
            if wanted:  # without any key the sum is 0, and so is its gradient
                torch.div(sums.weighted, sums.total.clamp(min=1e-30)[:, None], out=means[rows])
        ctx.save_for_backward(queries, keys, result, means)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        queries, keys, result, means = ctx.saved_tensors
        grad = grad[:, None] * ctx.scale
        grad_keys = None
        if ctx.needs_input_grad[1]:
            grad_keys = torch.zeros_like(keys)
            keys_size, rows_size = BLOCKS.get(queries.device.type, LARGE_BLOCKS)
            with torch.autocast(grad.device.type, enabled=False):
                for rows in _blocks(len(queries), rows_size):
                    scaled, weighted = queries[rows] * ctx.scale, queries[rows] * grad[rows]
                    for columns in _blocks(len(keys), keys_size):
                        softmax = torch.addmm(-result[rows], keys[columns], scaled.T).exp_()
                        grad_keys[columns].addmm_(softmax, weighted)
        return None if means is None else means * grad, grad_keys, None, None
