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

from kdlib.config import InputError
from kdlib.losses.base import as_float

BLOCKS = {"cpu": (1024, 512)}  # queries and keys of a block: it stays in a CPU's cache
LARGE_BLOCKS = (4096, 4096)  # other devices want few large launches
SAFE = 60.0  # exponentials of +-60 and sums of 1e12 of them are far inside single precision: no maximum is needed


def log_sum_exp(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    unit: bool = False,
) -> Tensor:
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

    Returns:
        [n]; -inf for a query that is left without a key.
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


def self_log_sum_exp(vectors: Tensor, scale: float, unit: bool = False) -> Tensor:
    """`log sum_{j != i} exp(scale * z_i . z_j)` of every vector [n, d], as in a contrast of a batch with itself.

    Each block of products serves its rows and its columns: n n d floating-point operations forward, 3 n n d backward.
    First derivatives only.

    Raises:
        InputError: where there are fewer than two vectors.
    """
    if len(vectors) < 2:
        raise InputError(f"a contrast of {len(vectors)} vectors with themselves: give at least two")
    with torch.autocast(vectors.device.type, enabled=False):
        return _SelfLogSumExp.apply(as_float(vectors), scale, unit and scale <= SAFE)


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


class _SelfLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors: Tensor, scale: float, bounded: bool) -> Tensor:
        parts = _parts(vectors)
        sums = [_Sums(vectors[rows], bounded) for rows in parts]
        for i, j, products in _triangle(vectors, scale, parts):
            if i != j and bounded:  # the same exponentials serve both
                exponentials = products.exp_()
                sums[i].total += exponentials.sum(1)
                sums[j].total += exponentials.sum(0)
                continue
            if i != j:
                sums[j].add(products.T.clone(), vectors[parts[i]])
            sums[i].add(products, vectors[parts[j]])
        result = torch.cat([part.log() for part in sums])
        ctx.save_for_backward(vectors, result)
        ctx.scale, ctx.bounded = scale, bounded
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        vectors, result = ctx.saved_tensors
        result_grad = torch.zeros_like(vectors)
        weights = grad * torch.exp(-result) if ctx.bounded else None
        with torch.autocast(grad.device.type, enabled=False):
            parts = _parts(vectors)
            for i, j, products in _triangle(vectors, ctx.scale, parts):
                rows, columns = parts[i], parts[j]
                # d loss / d product: pair (i, j) counts in the sum of i and in that of j
                if ctx.bounded:
                    pairs = products.exp_().mul_(weights[rows, None] + weights[columns])
                else:
                    pairs = torch.exp(products - result[rows, None]) * grad[rows, None]
                    pairs += products.sub_(result[columns]).exp_().mul_(grad[columns])
                result_grad[rows].addmm_(pairs, vectors[columns])
                if i != j:
                    result_grad[columns].addmm_(pairs.T, vectors[rows])
        return result_grad.mul_(ctx.scale), None, None


def _parts(vectors: Tensor) -> list[slice]:
    return list(_blocks(len(vectors), min(BLOCKS.get(vectors.device.type, LARGE_BLOCKS))))


def _triangle(vectors: Tensor, scale: float, parts: list[slice]) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks (i, j >= i) of scaled products, a vector's product with itself being -inf."""
    for i, rows in enumerate(parts):
        scaled = vectors[rows] * scale
        for j in range(i, len(parts)):
            products = scaled @ vectors[parts[j]].T
            if i == j:
                products.fill_diagonal_(-torch.inf)  # taking it off the sum afterwards would lose digits
            yield i, j, products
