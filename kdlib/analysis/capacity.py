"""What network, labels, teacher and a third dimension are worth, from the Dice of the same patients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from kdlib.analysis.comparisons import baseline_pairs, compare
from kdlib.analysis.convergence import convergence
from kdlib.analysis.labels import SHAPES, methods, percent, way_of_learning
from kdlib.analysis.sentences import NOT_CONVERGED, counted_verdicts, interval_of, many, withhold
from kdlib.config import InputError

RUNTIMES = {  # a library that runs a network -> how figures call it
    "eager": "PyTorch", "bf16": "PyTorch bf16", "onnx": "ONNX Runtime", "openvino-int8": "OpenVINO int8",
}  # fmt: skip
QUESTIONS = {  # -> how a sentence begins
    "network": "The network, alone, instead of S1",
    "equal cost": "Kernel, depth and receptive field at the arithmetic of E1, alone, instead of E1",
    "labels": "The labels, student alone",
    "teacher": "The teacher, instead of the same student alone",
}
AGAINST_SLICES = {  # the same of `against_slices`
    "same network": "Volumes instead of slices, the same network",
    "equal latency": "Volumes instead of slices, at about the same CPU latency",
    "teacher": "The teacher, on volumes, instead of the same student alone",
}
SAME_COST = 0.05  # relative difference of GFLOP that counts as none
SAME_LATENCY = 1.5  # factor between two latencies up to which they count as equal


def worth(cases: pd.DataFrame, history: pd.DataFrame, networks: pd.DataFrame) -> pd.DataFrame:
    """Every network against S1, those of E1's cost against it, most labels against fewest, and every distilled student
    against itself alone.

    Each question is a family of its own for Holm's adjustment; where a training has not converged, there is no verdict.

    Args:
        cases, history: of the chapter's runs.
        networks: a row per network, with columns model and gflops.

    Returns: the columns of `statistics.compare`, after question (a key of `QUESTIONS`), said (its first words), labels
        (their share, in words) and model (of a).

    Raises: InputError: nothing to compare, or a network that is not in `networks`.
    """
    found = methods(cases)
    alone = found[found["role"] == "baseline"].reset_index()
    by = {(row.model, row.fraction): row.method for row in alone.itertuples()}
    models, fractions = list(alone["model"].unique()), sorted(alone["fraction"].unique(), reverse=True)
    gflops = networks.set_index("model")["gflops"]
    if missing := sorted(set(models) - set(gflops.index)):
        raise InputError(f"no cost of {', '.join(missing)} in the table of networks: run notebook 10 again")
    alike = [name for name in models if "E1" in gflops and abs(gflops[name] / gflops["E1"] - 1) <= SAME_COST]
    pairs: dict[str, dict[tuple[str, str], str]] = {question: {} for question in QUESTIONS}  # -> pair -> labels
    for fraction in fractions:
        share = f"on {percent(fraction)} of the labels"
        for question, other, those in (("network", "S1", models), ("equal cost", "E1", alike)):
            if (other, fraction) in by:
                own = [(by[name, fraction], by[other, fraction]) for name in those if (name, fraction) in by]
                pairs[question] |= {pair: share for pair in own if pair[0] != pair[1]}
        taught = [pair for pair in baseline_pairs(cases) if found.loc[pair[0], "fraction"] == fraction]
        pairs["teacher"] |= dict.fromkeys(taught, share)
    most, least = fractions[0], fractions[-1]
    if most > least:
        both = [(by[name, most], by[name, least]) for name in models if {(name, most), (name, least)} <= set(by)]
        pairs["labels"] = dict.fromkeys(both, f"{percent(most)} instead of {percent(least)}")
    return _asked(cases, history, pairs, QUESTIONS)


def _asked(
    cases: pd.DataFrame, history: pd.DataFrame, pairs: Mapping[str, Mapping[tuple[str, str], str]],
    said: Mapping[str, str],
) -> pd.DataFrame:  # fmt: skip
    """The comparisons of several questions, see `worth`; `pairs` has for each of them pairs of methods -> labels."""
    model, progress, tables = methods(cases)["model"], convergence(history), []
    for question, asked in pairs.items():
        if asked:
            table = withhold(compare(cases, list(asked)), progress)
            about = dict(question=question, said=said[question], labels=list(asked.values()))
            tables.append(pd.DataFrame(about).assign(model=table["a"].map(model)).join(table))
    return pd.concat(tables, ignore_index=True)


def against_slices(cases: pd.DataFrame, history: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Every network on volumes against the same on slices, and every student against the one on slices whose latency on
    a CPU is nearest, where that is within a factor of 1.5; both learn alike, from the same labels and the same teacher.
    And distilled students on volumes against themselves alone.

    Args:
        cases, history: of both studies, with the column dimensions.
        costs: a row per network and dimensions: model, dimensions and volume_ms.

    Returns: the columns of `worth`, with a key of `AGAINST_SLICES` as question and a student's way of learning beside
        its model, and slower: how many times b's latency a takes.

    Raises: InputError: a study without volumes or without slices, or a network that is not in `costs`.
    """
    found = methods(cases)
    if set(found["dimensions"]) != set(SHAPES):
        raise InputError("against_slices: the table needs methods on slices and on volumes (column dimensions)")
    found["time"] = volume_times(found, costs)
    pairs: dict[str, dict[tuple[str, str], str]] = {question: {} for question in AGAINST_SLICES}
    shares = "on " + found["fraction"].map(percent) + " of the labels"
    flat, deep = (found[found["dimensions"] == number] for number in SHAPES)
    place = ["role", "teacher", "fraction"]
    for name, row in deep.iterrows():
        alike = flat[(flat[place] == row[place]).all(axis=1)]
        pairs["same network"] |= {(name, other): shares[name] for other in alike.index[alike["model"] == row["model"]]}
        apart = np.exp(np.log(alike["time"] / row["time"]).abs())
        if row["role"] != "teacher" and apart.min() <= SAME_LATENCY:
            pairs["equal latency"][name, apart.idxmin()] = shares[name]
    volumes = cases[cases["method"].isin(deep.index)]
    pairs["teacher"] = {pair: shares[pair[0]] for pair in baseline_pairs(volumes)}
    table, time = _asked(cases, history, pairs, AGAINST_SLICES), found["time"]
    ways = found.apply(
        lambda row: row["model"] if row["role"] == "teacher" else f"{row['model']} {way_of_learning(row)}", axis=1
    )
    return table.assign(model=table["a"].map(ways), slower=table["a"].map(time) / table["b"].map(time))


def volume_times(found: pd.DataFrame, costs: pd.DataFrame) -> pd.Series:
    """Latency of a volume in ms of every method (a row of `methods`, with model and dimensions).

    Raises: InputError: a network that is not in `costs`.
    """
    times = costs.set_index(["model", "dimensions"])["volume_ms"]
    keys = list(zip(found["model"], found["dimensions"], strict=True))
    if missing := sorted({f"{model} ({SHAPES[size]})" for model, size in keys if (model, size) not in times}):
        raise InputError(f"no cost of {', '.join(missing)} in the table of costs: run notebook 11 again")
    return times[keys].set_axis(found.index)


def worth_sentences(table: pd.DataFrame) -> list[str]:
    """One sentence per question and share of labels: the smallest and the largest change of Dice, each with its
    interval, and how many are decided.

    Args:
        table: from `worth` or `against_slices`.
    """
    sentences = []
    for (_, said, share), rows in table.groupby(["question", "said", "labels"], sort=False):
        known = rows[rows["verdict"] != NOT_CONVERGED]
        begin, left_out = f"**{said}, {share}**", len(rows) - len(known)
        if known.empty:
            sentences.append(f"{begin}: no verdict yet, a training of each of the {len(rows)} pairs has not converged.")
            continue
        ends = known.loc[list(dict.fromkeys([known["difference"].idxmin(), known["difference"].idxmax()]))]
        changes = [f"{interval_of(row.difference, row.low, row.high)} ({row.model})" for row in ends.itertuples()]
        of = f"of {many(len(known), 'comparison')}"
        text = f"{begin}: Dice changes by {' to '.join(changes)}; {of}: {counted_verdicts(known['verdict'])}"
        text += f"; left out: {left_out} that have not converged" if left_out else ""
        sentences.append(f"{text}. n = {many(int(known['n'].min()), 'patient')}.")
    return sentences
