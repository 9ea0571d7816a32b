"""How often the intervals cover the true difference, and how often a family of tests finds one where none is.

    python benchmarks/coverage.py [--studies 2000] [--families 1000]

Dice is drawn from beta distributions about each patient's own level (most patients easy, some hard), for two methods
and one or three seeds; the truth is the mean over very many patients. The intervals are those of
`kdlib.analysis.intervals`.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit

from kdlib.analysis import statistics
from kdlib.analysis.intervals import bca, interval, resample, studentised
from kdlib.analysis.statistics import holm

# what method b loses to a, in the logit of Dice, by patient
KINDS = {
    "symmetric": "the same on average, more with one patient, less with another",
    "skewed": "a little with most patients, much with a few (skewness of the differences about 1.4)",
    "failures": "as skewed, and one patient in ten loses more than half of its Dice",
    "own trainings": "as skewed, and each training of either method is better or worse as a whole",
}
METHODS = ("studentised", "BCa", "percentile", "Student's t")


def differences(kind: str, studies: int, n: int, seeds: int, generator: np.random.Generator) -> np.ndarray:
    """Differences in Dice (studies x patients x seeds) of a method to another on the same patients."""
    level = generator.normal(1.8, 0.9, (studies, n, 1))
    if kind == "symmetric":
        gain, loss = np.zeros_like(level), generator.normal(0, 0.25, level.shape)
    else:
        tail = 0.35 * generator.standard_exponential(level.shape)
        gain, loss = 0.5 * tail, tail
    if kind == "own trainings":
        gain, loss = (part + generator.normal(0, 0.15, (studies, 1, seeds)) for part in (gain, loss))
    a, b = expit(level + gain), expit(level - loss)
    if kind == "failures":
        b = b * np.where(generator.random(b.shape) < 0.1, 0.4, 1)
    shape = (studies, n, seeds)
    return generator.beta(60 * a, 60 * (1 - a), shape) - generator.beta(60 * b, 60 * (1 - b), shape)


def truth(kind: str) -> float:
    generator = np.random.default_rng(99)
    return float(np.mean([differences(kind, 20_000, 10, 3, generator).mean() for _ in range(5)]))


def noise_of(study: np.ndarray) -> pd.DataFrame:
    """`seed_noise` of one study (patients x seeds): every patient was seen by the same trainings."""
    columns = pd.MultiIndex.from_product([[0], range(study.shape[1])])
    return pd.DataFrame(study - study.mean(axis=1, keepdims=True), columns=columns)


def coverage(kind: str, n: int, seeds: int, studies: int, methods=METHODS, resamples: int = 1999) -> dict[str, float]:
    """Share of studies whose 95 % interval holds the truth, by method."""
    true, hits = truth(kind), dict.fromkeys(methods, 0)
    for study in differences(kind, studies, n, seeds, np.random.default_rng((n, seeds))):
        values = study.mean(axis=1)
        drawn = resample(values, noise_of(study) if seeds > 1 else None, resamples)
        for method in methods:
            if method == "studentised":
                low, high, _ = studentised(values.mean(), values.std(), drawn.mean(axis=1), drawn.std(axis=1), n, 0.95)
            elif method == "BCa":
                low, high, _ = bca(values, drawn, 0.95)
            elif method == "percentile":
                low, high = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
            else:
                low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
            hits[method] += low <= true <= high
    return {method: count / studies for method, count in hits.items()}


def same(count: int, families: int, n: int, generator: np.random.Generator) -> np.ndarray:
    """Dice (families x patients x methods) of methods that are all the same."""
    level = expit(generator.normal(1.8, 0.9, (families, n, 1)))
    return generator.beta(60 * level, 60 * (1 - level), (families, n, count))


def false_families(n: int, families: int, comparisons: int = 19) -> float:
    """Share of families, each of methods that are all the same compared with one of them, that finds
    one better or worse: as `compare` has it."""
    dice = same(comparisons + 1, families, n, np.random.default_rng(n))
    difference = (dice[:, :, 1:] - dice[:, :, :1]).round(12)
    found = 0
    for family, p in zip(difference, stats.wilcoxon(difference, axis=1).pvalue, strict=True):
        if p.min() < statistics.ALPHA / comparisons:  # else Holm decides nothing
            decided = (family[:, column] for column in np.flatnonzero(holm(p) < statistics.ALPHA))
            found += any(low > 0 or high < 0 for low, high, _ in map(interval, decided))
    return found / families


def false_corrections(n: int, families: int, stages: int = 9, pooled: bool = False) -> float:
    """The same for a correction none of whose steps changes anything, as `step_changes` has it."""
    generator = np.random.default_rng(n)
    weight = generator.lognormal(5, 0.7, (families, n)) if pooled else np.ones((families, n))
    steps = [*((stage, stage - 1) for stage in range(1, stages)), (stages - 1, 0)]
    found = 0
    for dice, volumes in zip(same(stages, families, n, generator), weight, strict=True):
        values = np.stack([dice.T, np.tile(volumes, (stages, 1))], axis=1)
        if statistics.paired_permutation(values, steps).min() < statistics.ALPHA:  # else there is no verdict
            found += (statistics.paired_changes(values, steps)["verdict"] != "inconclusive").any()
    return found / families


def power(n: int, tests: int, studies: int) -> float:
    """Share of studies in which the minimum detectable difference is found: 80 % if it is what it says."""
    noise = np.random.default_rng(n).normal(size=(studies, n))
    shift = statistics.minimum_detectable_difference(np.random.default_rng(0).normal(size=n), tests)
    shift /= np.std(np.random.default_rng(0).normal(size=n), ddof=1)  # in standard deviations
    return float((stats.wilcoxon(noise + shift, axis=1).pvalue < statistics.ALPHA / tests).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--families", type=int, default=2000)
    given = parser.parse_args()
    for kind, words in KINDS.items():
        print(f"\n{kind}: b loses {words}; mean difference {truth(kind):.3f}; % of 95 % intervals that hold it")
        for n in (6, 8, 12, 24, 41, 60, 100):
            for seeds in (1, 3):
                found = coverage(kind, n, seeds, given.studies)
                row = "".join(f"  {method} {share:6.1%}" for method, share in found.items())
                print(f"  n {n:3d}, seeds {seeds}:{row}", flush=True)
    print("\nfamilies in which nothing is different, % that find one better or worse")
    for n in (6, 8, 14, 24, 41):
        walks = f"correction of 8 steps {false_corrections(n, given.families // 5):.1%}"
        pooled = f"with pooled voxels {false_corrections(n, given.families // 5, pooled=True):.1%}"
        print(
            f"  n {n:3d}: 19 methods against one {false_families(n, given.families):.1%}; {walks}, {pooled}", flush=True
        )
    print("\npower at the minimum detectable difference (80 % if it is that)")
    for n, tests in ((8, 1), (14, 1), (14, 19), (24, 1), (24, 19), (41, 19)):
        print(f"  n {n:3d}, {tests:2d} tests: {power(n, tests, given.studies):.1%}")


if __name__ == "__main__":
    main()
