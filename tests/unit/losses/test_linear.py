"""The blockwise log-sum-exp against the dense one in float64: values, gradients, groups, and memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from kdlib.losses import linear
from kdlib.losses.linear import log_sum_exp


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(linear, "BLOCKS", {"cpu": (4, 3)})


def vectors(*shape, seed=0, dtype=torch.float64, normalise=True):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (F.normalize(x, dim=1) if normalise else x).to(dtype)


def dense(queries, keys, scale, query_groups=None, key_groups=None):
    """Query by query, pair by pair."""
    rows = []
    for i, query in enumerate(queries):
        kept = [
            scale * (query * key).sum()
            for j, key in enumerate(keys)
            if query_groups is None or j == i or key_groups[j] != query_groups[i]
        ]
        rows.append(torch.stack(kept).exp().sum().log())
    return torch.stack(rows)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 3), (9, 7), (5, 13)])
@pytest.mark.parametrize(("scale", "unit"), [(1.0, True), (10.0, False), (100.0, True)])
def test_it_is_the_dense_formula_and_so_is_its_gradient(n, m, scale, unit):
    queries, keys = vectors(n, 5).requires_grad_(), vectors(m, 5, seed=1).requires_grad_()
    weights = torch.arange(1.0, n + 1, dtype=torch.float64)
    found, expected = log_sum_exp(queries, keys, scale, unit=unit), dense(queries, keys, scale)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((x * weights).sum(), (queries, keys)) for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("extra", [0, 6])
@pytest.mark.parametrize("groups", [[0] * 8, [0, 1] * 4, [0, 0, 1, 1, 1, 2, 2, 5], list(range(8))])
@pytest.mark.parametrize("unit", [False, True])
def test_keys_of_the_same_group_are_left_out_but_for_the_own_position(extra, groups, unit):
    queries, keys = vectors(8, 5).requires_grad_(), vectors(8 + extra, 5, seed=1).requires_grad_()
    query_groups = torch.tensor(groups)
    key_groups = torch.cat([query_groups, torch.tensor([0, 1, 2, 3, 0, 1])[:extra]])
    found = log_sum_exp(queries, keys, 5.0, query_groups, key_groups, unit)
    expected = dense(queries, keys, 5.0, query_groups, key_groups)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*[torch.autograd.grad(x.pow(2).sum(), (queries, keys)) for x in (found, expected)])


@pytest.mark.parametrize("unit", [False, True])
def test_without_a_key_it_is_minus_infinity_and_passes_no_nan(unit):
    queries = vectors(3, 2).requires_grad_()
    found = log_sum_exp(queries, vectors(0, 2), 1.0, unit=unit)
    assert torch.equal(found, torch.full((3,), -torch.inf, dtype=torch.float64))
    torch.logaddexp(found, torch.ones(3, dtype=torch.float64)).sum().backward()
    assert not queries.grad.any()


@pytest.mark.parametrize("temperature", [0.01, 0.4])
@pytest.mark.parametrize("unit", [False, True])
def test_single_precision_keeps_five_digits_at_two_thousand(temperature, unit):
    queries, keys = vectors(2048, 64), vectors(2048, 64, seed=1)
    keys[:100] = queries[:100]  # the extremes: 1 and -1
    keys[100:200] = -queries[100:200]
    weights = torch.linspace(-1, 2, 2048, dtype=torch.float64)
    results = []
    for dtype, function in ((torch.float32, log_sum_exp), (torch.float64, None)):
        q, k = queries.to(dtype).requires_grad_(), keys.to(dtype).requires_grad_()
        value = function(q, k, 1 / temperature, unit=unit) if function else (q @ k.T / temperature).logsumexp(1)
        results.append(
            (value.double(), *(g.double() for g in torch.autograd.grad((value * weights.to(dtype)).sum(), (q, k))))
        )
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_products_far_beyond_the_exponential_are_exact():
    queries = torch.tensor([[1e4, 0.0], [0.0, -1e4]])
    torch.testing.assert_close(log_sum_exp(queries, torch.eye(2), 10.0), torch.tensor([1e5, 0.0]))
    one = log_sum_exp(torch.ones(1, 1), -torch.ones(5, 1), 1000.0, unit=True)
    assert one.item() == pytest.approx(-1000 + math.log(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_enters_and_single_precision_leaves(dtype):
    queries, keys = (vectors(50, 8, seed=seed, dtype=dtype) for seed in (0, 1))
    leaf = queries.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_sum_exp(leaf, keys, 10.0, unit=True)
        found.sum().backward()
    assert found.dtype == torch.float32 and leaf.grad.isfinite().all()
    expected = (queries.double() @ keys.double().T * 10).logsumexp(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_frozen_keys_cost_no_products_backward():
    queries, keys = vectors(64, 8).requires_grad_(), vectors(64, 8, seed=1)
    loss = log_sum_exp(queries, keys, 10.0, unit=True).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    assert not {event.key for event in profile.key_averages()} & {"aten::mm", "aten::addmm", "aten::addmm_"}


def test_no_tensor_of_all_pairs_is_made():
    n = 4096
    queries, keys = (vectors(n, 4, seed=seed, dtype=torch.float32).requires_grad_() for seed in (0, 1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        log_sum_exp(queries, keys, 10.0).mean().backward()
    rows, columns = linear.BLOCKS["cpu"]
    assert max(event.cpu_memory_usage for event in profile.events()) <= 2 * rows * columns * 4 < n * n


@pytest.mark.gpu
@pytest.mark.parametrize("unit", [False, True])
def test_gpu_agrees_with_cpu(unit):
    results = []
    for device in ("cpu", "cuda"):
        queries, keys = (vectors(9000, 16, seed=s).to(device).requires_grad_() for s in (0, 1))
        value = log_sum_exp(queries, keys, 10.0, unit=unit)
        results.append([x.cpu() for x in (value, *torch.autograd.grad(value.sum(), (queries, keys)))])
    torch.testing.assert_close(*results)
