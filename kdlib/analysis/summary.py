"""The facts of a study that its report ends with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd


def facts(manifests: Iterable[Mapping], wanted: int) -> dict[str, str]:
    """What a study was made of, from the manifests of its runs.

    Args:
        manifests: as `manifest.json` holds them.
        wanted: number of runs in the study's tables; some may not be kept here.
    """
    records = [record for record in manifests if record.get("status") == "done"]
    if not records:
        return {"runs": f"{wanted}, without any manifest here"}
    hours = sum(sum(record["seconds"].values()) for record in records) / 3600
    dates = sorted(record["finished"] for record in records)
    parts = {part: {case for record in records for case in record["data"][part]} for part in ("train", "val", "test")}
    profiles = [record["run"]["profile"] for record in records]
    seeds = sorted({record["run"]["seed"] for record in records})
    return {
        "data set": _distinct(f"{record['run']['data']}, target {record['run']['target']}" for record in records),
        "volumes": ", ".join(f"{len(cases)} {part}" for part, cases in parts.items()),
        "profile": _distinct(f"{p['name']}; against the thesis: {p['reduced_from_thesis']}" for p in profiles),
        "protocol": _distinct(record["run"]["protocol"]["name"] for record in records),
        "folds": _distinct(str(record["run"]["fold"]) for record in records),
        "runs": f"{len(records)} of {wanted}, seeds {', '.join(map(str, seeds))}",
        "time": f"{hours:.1f} hours of training and evaluation, {dates[0][:16]} to {dates[-1][:16]}",
        "code": _distinct(map(_code, records)),
        "versions": "; ".join(f"{name} {text}" for name, text in records[0]["versions"].items()),
        "device": _distinct(f"{record['device']}, {record['precision']}" for record in records),
    }


def _code(record: Mapping) -> str:
    commit = record["git"]["commit"]
    if commit is None:
        return f"not a git checkout; files of the package: hash {record['code']['hash'][:12]}"
    return f"commit {commit[:12]}{' with changes' if record['git']['dirty'] else ''}"


def _distinct(values: Iterable[str]) -> str:
    """Values in order of appearance; how often each occurs where there are several."""
    counts = pd.Series(list(values)).value_counts(sort=False)
    return counts.index[0] if len(counts) == 1 else "; ".join(f"{text} ({n} runs)" for text, n in counts.items())
