"""What follows from a table, in sentences: generated, so that no sentence says what its table does not."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

NOT_CONVERGED = "not converged"
VERDICTS = {
    "better": "does better than", "worse": "does worse than", "inconclusive": "differs inconclusively from",
    NOT_CONVERGED: "cannot be compared yet with",
}  # fmt: skip


def withhold(verdicts: pd.DataFrame, convergence: pd.DataFrame, by: str = "method") -> pd.DataFrame:
    """The verdicts, with "not converged" wherever one of the two methods has not: nothing is compared before it has.

    Args:
        verdicts: from `statistics.compare`, with columns a, b and verdict.
        convergence: from `kdlib.analysis.convergence.convergence`.
    """
    rising = set(convergence.loc[~convergence["converged"], by])
    unfinished = verdicts["a"].isin(rising) | verdicts["b"].isin(rising)
    return verdicts.assign(verdict=verdicts["verdict"].mask(unfinished, NOT_CONVERGED))


def comparison_sentences(
    verdicts: pd.DataFrame, labels: Mapping[str, str], seeds: int, metric: str = "Dice", unit: str = ""
) -> list[str]:
    """One sentence per comparison: methods, effect with its interval, patients, seeds, adjusted p and verdict.

    Args:
        verdicts: columns a, b, n, difference, low, high, p_holm and verdict.
        labels: method -> how readers know it.
        seeds: trainings per method and fold that the means are over.
    """
    sentences = []
    for row in verdicts.itertuples():
        effect = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]{f' {unit}' if unit else ''}"
        trained = f"{row.n} patients, {seeds} seed{'s' if seeds > 1 else ''}"
        p = "" if pd.isna(row.p_holm) else f", p {row.p_holm:.3f}" if row.p_holm >= 0.001 else ", p < 0.001"
        a, b = (labels.get(name, name) for name in (row.a, row.b))
        sentences.append(f"{a} {VERDICTS[row.verdict]} {b}: {metric} {effect} ({trained}{p}).")
    return sentences


def convergence_sentence(convergence: pd.DataFrame, labels: Mapping[str, str]) -> str:
    """Which trainings have converged, in one sentence."""
    rising = convergence[~convergence["converged"]]
    if rising.empty:
        most = f"{convergence['last_fifth'].max():.3f} Dice"
        return f"All {len(convergence)} methods have converged: the last fifth of no training gained more than {most}."
    parts = [f"{labels.get(row.method, row.method)} ({row.last_fifth:+.3f})" for row in rising.itertuples()]
    return (
        f"{len(rising)} of {len(convergence)} methods have not converged, and get no verdict: the last fifth of the "
        f"training still gained more than 0.01 Dice for {', '.join(parts)}."
    )
