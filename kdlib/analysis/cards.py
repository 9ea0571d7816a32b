"""What a reviewer asks of a study, read off its runs' manifests and tables: its protocol, and a model card a student.

Nothing here is typed by hand: a number that no manifest or table holds is "not recorded".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kdlib.analysis.metrics import METRICS
from kdlib.analysis.statistics import ALPHA, interval_text, summarise
from kdlib.config import (
    LOGIT_CUT,
    LOSS_NAMES,
    PUBLISHED_OPTIMISATION,
    SHARED_OPTIMISATION,
    SWITCHES,
    InputError,
    Optimisation,
)

UNKNOWN = "not recorded"
LEVEL = f"{100 * (1 - ALPHA):.0f} %"
FAULTS = {  # switches of a protocol -> the published fault that each one keeps
    "own_optimisers": "teacher, baseline and distilled students differ in optimiser, learning rate, batch and loss",
    "byte_image": "intensities are clipped to 0..255 whatever they mean; no window, spacing or orientation",
    "redrawn_projectors": "projections of features are drawn anew at every step and never trained",
    "one_channel_softmax": "the prediction-map term takes a softmax over one channel, so that it is always 0",
    "unlabelled_contrast": "the contrast sees one vector a slice and no labels",
    "test_selection": "the best epoch is chosen on the test patients, so that every test result is too good",
    "logit_threshold": f"the raw logit is cut at 0.5, a probability of {LOGIT_CUT:.2f}",
    "pooled_dice": "the best epoch is chosen by the Dice of the pixels of all slices, which large organs decide",
}
WHY = {
    "dice": "overlap by volume; the endpoint of every comparison unless a table says otherwise",
    "iou": "the same ranking as Dice; beside it because the thesis reports it",
    "recall": "share of the target that is found; undefined without target",
    "precision": "share of the prediction that is right; undefined without prediction",
    "hd95": "how far the boundary is off where it is worst, less its worst 5 %; undefined where one mask is empty",
    "assd": "how far the boundary is off on average; undefined where one mask is empty",
    "nsd": "share of the boundary within a tolerance: what overlap hides in small and thin targets",
    "volume_error": "predicted less true volume: the bias of a measurement; it has no better direction",
    "truth_volume": "describes the case",
}
CLAIM = {
    "Data source, number of patients and volumes, exclusions": "Data flow",
    "Preprocessing": "Preprocessing",
    "Reference standard, annotators, demographics, ethics approval": "not recorded: see the data set's own paper",
    "Partitions, their level and how they were made": "Splits",
    "Model: architecture, parameters": "Arms and budgets; model cards",
    "Training: loss, optimiser, budget, augmentation, initial weights": "Arms and budgets; Seeds",
    "Choice of the final model": "Selection rule",
    "Metrics and the reason for them": "Metrics",
    "Statistics, uncertainty": "Statistics",
    "Failures": "model cards",
    "External test data": "none: every patient is of one data set",
    "Software, hardware, code": "Hardware and versions; Code",
    "Limits": "Known limits",
}


def write_cards(folder: Path | str, results: Path | str) -> list[Path]:
    """Writes `<folder>/protocol.md` and `<folder>/cards/<arm>-<key>.md`, one for each student whose weights are there.

    Args:
        folder: of a study, with `tables/*_runs.csv`.
        results: folder with `runs/<key>/manifest.json` of these runs.

    Returns:
        the files, the protocol first.

    Raises:
        InputError: the study has no table of runs, or runs without a (finished, readable) manifest, all named.
    """
    folder, results = Path(folder), Path(results)
    runs = _tables(folder, "runs").drop_duplicates("run", ignore_index=True)
    records = _manifests(runs, results, folder.name)
    cases = _tables(folder, "cases").drop_duplicates(["run", "case", "class", "metric"], ignore_index=True)
    arms = pd.DataFrame([_describe(record, results / "runs" / key) for key, record in records.items()], list(records))
    written = [_write(folder / "protocol.md", _protocol(folder, results, records, arms, cases))]
    for key, record in records.items():
        weights = results / "runs" / key / "best.safetensors"
        if not arms.loc[key, "is_teacher"] and weights.is_file():
            name = re.sub(r"[^a-z0-9]+", "-", record["arm"].lower()).strip("-")
            written.append(_write(folder / "cards" / f"{name}-{key}.md", _card(record, records, arms, cases, weights)))
    return written


# ------------------------------------------------------------------------------------------------------------- reading


def _tables(folder: Path, part: str) -> pd.DataFrame:
    """All `tables/<experiment>_<part>.csv` of a study below each other, but those of the data itself."""
    paths = [path for path in sorted((folder / "tables").glob(f"*_{part}.csv")) if path.name != "00_data_cases.csv"]
    if not paths:
        raise InputError(f"{folder / 'tables'} holds no *_{part}.csv: run a notebook of this study first")
    text = dict.fromkeys(("run", "case", "patient", "class"), str)  # a key or a name may look like a number
    return pd.concat([pd.read_csv(path, dtype=text) for path in paths], ignore_index=True)


def _manifests(runs: pd.DataFrame, results: Path, study: str) -> dict[str, dict]:
    """Run -> its manifest, in the order of `runs`; then those of teachers that the study's tables do not hold."""
    records, faults = {}, []
    for key, arm in zip(runs["run"], runs["arm"], strict=True):
        path = results / "runs" / key / "manifest.json"
        try:
            records[key] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            faults.append(f"{path} ({arm}) is missing")
            continue
        except (OSError, ValueError) as error:
            faults.append(f"{path} ({arm}) cannot be read ({error})")
            continue
        if records[key].get("status", "done") != "done":
            faults.append(f"{path} ({arm}) is of a run that is not done ({records[key]['status']})")
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise InputError(
            f"study {study}: {len(faults)} of {len(runs)} runs of its tables have no usable manifest: "
            f"{'; '.join(faults[:8])}{more}; bring their folders back, or run the study again"
        )
    for key in {key: None for record in records.values() for key in record.get("teachers", {}).values()}:
        path = results / "runs" / key / "manifest.json"
        if key not in records and path.is_file():
            teacher = json.loads(path.read_text(encoding="utf-8"))
            if teacher["run"]["recipe"]["name"] == "teacher":
                records[key] = teacher
    return records


def _describe(record: dict, folder: Path) -> dict[str, object]:
    """What tables of the protocol say of one run."""
    run, profile = record["run"], record["run"]["profile"]
    is_teacher = run["recipe"]["name"] == "teacher"
    role = "teacher" if is_teacher else "distilled" if run["teacher"] else "baseline"
    steps = profile["teacher_steps" if is_teacher else "student_steps"]
    how, epochs = _optimisation(record, role), int(pd.read_csv(folder / "history.csv")["epoch"].max())
    return {
        "arm": record["arm"],
        "recipe": run["recipe"]["name"],
        "protocol": run["protocol"]["name"],
        "is_teacher": is_teacher,
        "fold": run["fold"],
        "seed": run["seed"],
        "parameters": record["parameters"],
        "optimiser": f"{how['optimiser']}, {how['schedule']}",
        "learning rate": f"{how['lr']:g}",
        "batch": how["batch"],
        "epochs": epochs,
        "steps an epoch": steps or "one pass",
        "updates": record.get("steps") or (epochs * steps if steps else UNKNOWN),
        "seconds": record["seconds"]["training"],
    }


def _optimisation(record: dict, role: str) -> dict[str, object]:
    """Optimiser, rate and batch of a run; manifests hold them in one of two places, or only the switch for them."""
    protocol = record["run"]["protocol"]
    if "optimisation" in record:
        return record["optimisation"]
    if role in protocol:
        return protocol[role]
    found: Optimisation = PUBLISHED_OPTIMISATION[role] if protocol.get("own_optimisers") else SHARED_OPTIMISATION
    return vars(found)


def _kept(record: dict) -> list[str]:
    """Switches of the published faults that a run keeps."""
    return [switch for switch in SWITCHES if record["run"]["protocol"].get(switch)]


# ------------------------------------------------------------------------------------------------------------ Markdown


def _write(path: Path, lines: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _markdown(table: pd.DataFrame) -> list[str]:
    def row(cells: Iterable[object]) -> str:
        return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"

    return ["", row(table.columns), row("---" for _ in table), *map(row, table.itertuples(index=False)), ""]


def _items(lines: Iterable[str]) -> list[str]:
    return ["", *(f"- {line}" for line in lines), ""]


def _listed(values: Iterable[object]) -> str:
    """Distinct values in order, e.g. "0, 1"."""
    return ", ".join(map(str, dict.fromkeys(values)))


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _grouped(table: pd.DataFrame) -> pd.DataFrame:
    """Equal rows as one, with how many runs they stand for."""
    return (
        table.fillna(UNKNOWN).groupby(list(table), sort=False, as_index=False).size().rename(columns={"size": "runs"})
    )


# ------------------------------------------------------------------------------------------------------------ protocol


def _protocol(
    folder: Path, results: Path, records: dict[str, dict], arms: pd.DataFrame, cases: pd.DataFrame
) -> list[str]:
    every, parts = list(records.values()), _parts(folder, results, records)
    finished = sorted(record["finished"] for record in every)
    return [
        f"# Protocol of the study {folder.name}",
        "",
        f"Made by `kdlib.analysis.cards` from the manifests of {_count(len(every), 'run')} (finished {finished[0]} to "
        f"{finished[-1]}) and the tables of the study. It answers what CLAIM (Tejani et al., Radiology: Artificial "
        "Intelligence 2024) and Metrics Reloaded (arXiv 2206.01653) ask of a report; the model cards stand beside it.",
        "",
        "## Known limits",
        *_items(_limits(every, arms, parts, cases)),
        "## Data flow",
        *_flow(folder, every, parts),
        "## Splits",
        *_splits(every, parts),
        "## Preprocessing",
        *_preprocessing(every),
        "## Arms and budgets",
        *_budgets(every, arms),
        "## Seeds",
        *_items(
            [
                f"seeds of the students: {_listed(sorted(arms.loc[~arms['is_teacher'], 'seed'])) or 'no student'}; of the "
                f"teachers: {_listed(sorted(arms.loc[arms['is_teacher'], 'seed'])) or 'no teacher'}",
                "a seed decides initial weights, order of the data and augmentation, each by a stream of its own",
            ]
        ),
        "## Selection rule",
        *_selection(every),
        "## Metrics",
        *_metrics(cases),
        "## Statistics",
        *_statistics(folder, cases, arms),
        "## Hardware and versions",
        *_markdown(_grouped(pd.DataFrame(map(_machine, every)))),
        "## Code",
        *_code(every),
        "## Where the items of CLAIM are answered",
        *_markdown(pd.DataFrame(CLAIM.items(), columns=["item", "where"])),
    ]


def _parts(folder: Path, results: Path, records: dict[str, dict]) -> pd.DataFrame:
    """One row a (split, fold, part, case): digest, fold, part, case, patient, slices.

    Patients come from the frozen split that the manifests name by its digest, else from the study's table of cases.
    """
    patients: dict[tuple[str, str], str] = {}
    digests = {record["data"]["digest"] for record in records.values()}
    for path in sorted((results / "splits").glob("*.json")):
        text = path.read_bytes()
        if (digest := hashlib.sha256(text).hexdigest()) in digests:
            patients |= {(digest, name): case["patient"] for name, case in json.loads(text)["cases"].items()}
    table = folder / "tables" / "00_data_cases.csv"
    volumes = pd.read_csv(table, dtype={"case": str, "patient": str}).set_index("case") if table.is_file() else None
    rows = []
    for record in records.values():
        data, run = record["data"], record["run"]
        name = "training" if run["fraction"] == 1 else f"training, {100 * run['fraction']:.0f} % of the labels"
        for part, label in (("train", name), ("val", "validation"), ("test", "test")):
            for case in data[part]:
                rows.append((data["digest"], run["fold"], label, str(case)))
    found = pd.DataFrame(rows, columns=["digest", "fold", "part", "case"]).drop_duplicates(ignore_index=True)
    known = dict(volumes["patient"]) if volumes is not None else {}
    found["patient"] = [
        patients.get((row.digest, row.case)) or known.get(row.case, row.case) for row in found.itertuples()
    ]
    return found.assign(slices=found["case"].map(volumes["z"]) if volumes is not None else float("nan"))


def _sizes(parts: pd.DataFrame) -> dict[str, object]:
    """Patients, volumes and slices of some rows of `_parts`, each counted once."""
    once = parts.drop_duplicates("case")
    slices = int(once["slices"].sum()) if once["slices"].notna().all() else UNKNOWN
    return {"patients": once["patient"].nunique(), "volumes": len(once), "axial slices": slices}


def _flow(folder: Path, every: list[dict], parts: pd.DataFrame) -> list[str]:
    rows = [{"fold": "all", "part": "all that these runs saw"} | _sizes(parts)]
    for (fold, part), group in parts.groupby(["fold", "part"], sort=False):
        rows.append({"fold": fold, "part": part} | _sizes(group))
    policies = {record["run"]["on_defect"] for record in every}
    dropped = [record["data"]["dropped"] for record in every if "dropped" in record["data"]]
    if dropped:
        lost = f"defective cases left out: {_listed(case for cases in dropped for case in cases) or 'none'}"
    elif policies == {"raise"}:
        lost = "defective cases left out: none (a defective case would have stopped the study)"
    else:
        lost = f"defective cases were left out; how many is {UNKNOWN} in the manifests, 00_data lists them"
    return [
        *_items(
            [
                f"data set: {_listed(record['run']['data'] for record in every)}",
                f"target: {_listed(record['run']['target'] for record in every)}",
                lost,
                f"slices are those of the volumes' own grid, as in `{folder.name}/tables/00_data_cases.csv`",
            ]
        ),
        *_markdown(pd.DataFrame(rows)),
    ]


def _leaks(parts: pd.DataFrame) -> list[str]:
    """Patients that are tested and also seen by training or selection, in one fold."""
    found = []
    for _, fold in parts.groupby(["digest", "fold"]):
        tested = fold["part"] == "test"
        found += sorted(set(fold.loc[tested, "patient"]) & set(fold.loc[~tested, "patient"]))
    return found


def _splits(every: list[dict], parts: pd.DataFrame) -> list[str]:
    folds = max(record["run"]["profile"]["folds"] for record in every)
    tested = sorted(parts["fold"].unique())
    leaks = _leaks(parts)
    lines = [
        f"{folds} outer folds by patient, written once, frozen with the hash of every file; "
        f"SHA-256 of the split: {_listed(f'`{digest}`' for digest in parts['digest'])}",
        f"tested here: {'fold' if len(tested) == 1 else 'folds'} {_listed(tested)} of 0 to {folds - 1}",
        "a share of the labels is a prefix of the training part, so that less labels lie within more",
        f"patients in the test part and in another part of one fold: {', '.join(leaks) or 'none'}",
    ]
    listed = []
    for (fold, part), group in parts.groupby(["fold", "part"], sort=False):
        sizes = _sizes(group)
        ends = f"{_count(sizes['patients'], 'patient')}, {_count(sizes['volumes'], 'volume')}"
        listed += [f"**Fold {fold}, {part}** ({ends}): {_listed(group['case'])}", ""]
    return [*_items(lines), *listed]


def _preprocessing(every: list[dict]) -> list[str]:
    rows = []
    for record in every:
        view = record["run"]["profile"]["preprocessing"]
        published = view.get("published", False) or record["run"]["protocol"].get("byte_image", False)
        spacing = "the volume's own" if view["spacing"] is None else f"{view['spacing']:g} mm"
        rows.append(
            {
                "slices": f"{view['size']} x {view['size']}",
                "in-plane spacing": "ignored" if published else spacing,
                "channels": view["channels"],
                "CT window (HU)": "none" if published else "{:g} to {:g}".format(*view["window"]),
                "MR percentiles": "none" if published else "{:g} to {:g}".format(*view["percentiles"]),
            }
        )
    return [
        "",
        "Axial slices of volumes in one orientation, resampled in the plane, clipped (CT to the window, MR to the "
        "percentiles of its own non-zero voxels) and scaled; padded or cropped about the centre.",
        *_markdown(_grouped(pd.DataFrame(rows))),
    ]


def _budgets(every: list[dict], arms: pd.DataFrame) -> list[str]:
    columns = [name for name in arms if name not in ("is_teacher", "fold", "seed", "seconds")]
    groups = arms.groupby(columns, sort=False, as_index=False, dropna=False)
    found = groups.agg(
        folds=("fold", lambda values: _listed(sorted(values))),
        seeds=("seed", lambda values: _listed(sorted(values))),
        runs=("seconds", "size"),
        seconds=("seconds", "mean"),
    )
    found["seconds"] = found["seconds"].round(1)
    lessons = {}
    for record in every:
        effective_recipe = record.get("effective_recipe", record["run"]["recipe"])
        lessons.setdefault((record["run"]["protocol"]["name"], effective_recipe["name"]), _lesson(effective_recipe))
    return [
        "",
        "Updates are optimiser steps. Seconds are those of training, mean of the runs; arms that trained together "
        "share them. Arms of one fold and seed see the same batches. What each recipe is:",
        *_items(f"{name} ({protocol}): {words}" for (protocol, name), words in lessons.items()),
        *_markdown(found),
    ]


def _lesson(effective_recipe: dict) -> str:
    """A recipe in words."""
    parts = [f"{effective_recipe['segmentation']} x {effective_recipe['segmentation_weight']:g}"]
    if effective_recipe.get("reconstruction_weight"):
        parts.append(f"reconstruction x {effective_recipe['reconstruction_weight']:g}")
    for term in effective_recipe["terms"]:
        heat = "" if term["temperature"] is None else f", temperature {term['temperature']:g}"
        loss = LOSS_NAMES.get(term["loss"], term["loss"])
        kind = "" if term.get("projector", "learned") == "learned" else f", {term['projector']} projectors"
        parts.append(f"{term['name']} ({loss}{heat}{kind}) x {term['weight']:g}")
    if effective_recipe.get("smoothing"):
        parts.append(f"labels smoothed by {effective_recipe['smoothing']:g}")
    if effective_recipe.get("teacher", "trained") != "trained":
        parts.append(f"{effective_recipe['teacher']} teacher")
    if effective_recipe.get("budget") == "both":
        parts.append("as long as student and teacher together")
    if effective_recipe.get("balance"):
        parts.append(f"terms balanced to {effective_recipe['balance']:g} of the segmentation's gradient")
    return " + ".join(parts)


def _selection(every: list[dict]) -> list[str]:
    rules = []
    for record in every:
        kept = _kept(record)
        part = "test" if "test_selection" in kept else "validation"
        how = "of the pixels of all its slices together" if "pooled_dice" in kept else "by volume, averaged"
        cut = f"{LOGIT_CUT:.2f} (logit 0.5)" if "logit_threshold" in kept else "0.5, or the likeliest class"
        rules.append(
            f"{record['run']['protocol']['name']}: Dice of the {part} part after each epoch, {how}, cut at {cut}"
        )
    return [
        "",
        "The weights of the best epoch (the first of equals) are kept and tested; those of the last are kept beside.",
        *_items(dict.fromkeys(rules)),
    ]


def _metrics(cases: pd.DataFrame) -> list[str]:
    rows = []
    for name, group in cases.groupby("metric", sort=False):
        metric = METRICS[name]
        better = {True: "more", False: "less", None: "neither"}[metric.higher]
        rows.append(
            {
                "metric": metric.label,
                "unit": metric.unit or "1",
                "better": better,
                "values": len(group),
                "undefined": int(group["value"].isna().sum()),
                "why": WHY[name],
            }
        )
    return [
        "",
        "Per volume and class, in the scan's own grid and in mm. Undefined values are left out of a mean, which then "
        "says its own n.",
        *_markdown(pd.DataFrame(rows)),
    ]


def _statistics(folder: Path, cases: pd.DataFrame, arms: pd.DataFrame) -> list[str]:
    _tested(cases)
    int(arms.groupby(["arm", "recipe", "protocol", "fold"])["seed"].nunique().max())
    lines = [
        "the unit is the patient: seeds, then classes, then the volumes of a patient are averaged before any test",
        f"intervals: {interval_text(summarise(cases, ['run'])['interval'])} (`kdlib.analysis.intervals.interval`, which "
        "states its coverage)",
        f"tests: Wilcoxon's signed-rank, paired by patient, two-sided at {ALPHA:g}, Holm over each family (the bridge: "
        "patients' values swapped at random, the largest difference of all steps, Westfall & Young 1993); a verdict "
        "(better, worse) needs the test and the interval, everything else is inconclusive",
    ]
    rows = []
    for path in sorted((folder / "tables").glob("*.csv")):
        table = pd.read_csv(path, nrows=1000)
        if {"verdict", "n"} <= set(table) and {"p_holm", "p_adjusted"} & set(table):
            family = table.dropna(subset=["verdict"])
            least = 2.0 ** (1 - int(family["n"].min())) * (len(family) if "p_holm" in table else 1)
            verdicts = family["verdict"].value_counts(sort=False)
            rows.append(
                {
                    "family": path.stem,
                    "comparisons": len(family),
                    "patients": _listed(family["n"].astype(int)),
                    "least possible adjusted p": f"{min(least, 1):.2g}",
                    "can decide": "yes" if least < ALPHA else "no, whatever the data: too few patients",
                    "verdicts": ", ".join(f"{count} {word}" for word, count in verdicts.items()),
                }
            )
    return [*_items(lines), *(_markdown(pd.DataFrame(rows)) if rows else [])]


def _tested(cases: pd.DataFrame) -> int:
    return cases.loc[cases["metric"] == "dice", "patient"].nunique()


def _machine(record: dict) -> dict[str, object]:
    hardware = record.get("hardware", {})
    return {
        "device": record["device"],
        "CPU": hardware.get("cpu", UNKNOWN),
        "cores": hardware.get("cores", UNKNOWN),
        "threads": record.get("threads", UNKNOWN),
        "precision": record["precision"],
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }


def _code(every: list[dict]) -> list[str]:
    rows = [
        {
            "commit": record["git"]["commit"] or UNKNOWN,
            "tree": {True: "with uncommitted changes", False: "clean", None: UNKNOWN}[record["git"]["dirty"]],
            "hash of the code that can change a result": record.get("code", {}).get("hash", UNKNOWN),
        }
        for record in every
    ]
    return _markdown(_grouped(pd.DataFrame(rows)))


def _limits(every: list[dict], arms: pd.DataFrame, parts: pd.DataFrame, cases: pd.DataFrame) -> list[str]:
    """What a reader must know before believing a number, each line drawn from the manifests."""
    found = [
        f"size: {words}" for words in dict.fromkeys(record["run"]["profile"]["reduced_from_thesis"] for record in every)
        if words != "nothing"
    ]  # fmt: skip
    folds = max(record["run"]["profile"]["folds"] for record in every)
    n = _tested(cases)
    if (tested := sorted(parts["fold"].unique())) != list(range(folds)):
        found.append(
            f"only fold {_listed(tested)} of {folds} was tested: {_count(n, 'patient')}, not all of the data set"
        )
    if n < 24:
        found.append(f"{n} test patients: intervals are wide, and only large differences can be shown at all")
    if leaks := _leaks(parts):
        found.append(f"LEAKAGE: {_count(len(leaks), 'patient')} in the test part and in another of the same fold")
    counts = arms.groupby(["arm", "recipe", "protocol", "fold"])["seed"].nunique()
    if counts.max() == 1:
        found.append("one seed an arm: intervals speak of these trainings, not of the method trained anew")
    elif counts.min() < counts.max():
        found.append(f"arms have {counts.min()} to {_count(counts.max(), 'seed')} a fold")
    found += _unequal(arms)
    switches = dict.fromkeys(switch for record in every for switch in _kept(record))
    for switch in switches:
        kept = dict.fromkeys(record["run"]["protocol"]["name"] for record in every if switch in _kept(record))
        found.append(f"published fault kept by {_listed(f'protocol {name!r}' for name in kept)}: {FAULTS[switch]}")
    commits = {record["git"]["commit"] for record in every}
    dirty = sum(record["git"]["dirty"] is not False for record in every)
    if len(commits) > 1:
        found.append(f"the runs come from {len(commits)} versions of the code: see Code")
    if dirty:
        found.append(f"{dirty} of {len(every)} runs were made with uncommitted changes, or outside a checkout")
    if split := sum(record.get("micro_batches", 1) > 1 for record in every):
        found.append(f"the batches of {_count(split, 'run')} were split to fit the memory")
    for name, values in (
        ("devices", {record["device"] for record in every}),
        ("sets of library versions", {json.dumps(record["versions"], sort_keys=True) for record in every}),
    ):
        if len(values) > 1:
            found.append(f"the runs come from {len(values)} {name}: see Hardware and versions")
    return [*found, "one data set, no external test data; training patients are shared between folds and arms"]


def _unequal(arms: pd.DataFrame) -> list[str]:
    """Students, and teachers, whose budget is not that of most of their kind."""
    found, budget = [], ["optimiser", "learning rate", "batch", "updates"]
    for is_teacher, kind in ((False, "students"), (True, "teachers")):
        own = arms[arms["is_teacher"] == is_teacher]
        groups = own.groupby(budget, sort=False, as_index=False).size().sort_values("size", ascending=False)
        if len(groups) < 2:
            continue
        usual = groups.iloc[0]
        found.append(
            f"the {kind} do not all have the same budget; most ({usual['size']} of {len(own)} runs) have "
            f"{usual['optimiser']}, learning rate {usual['learning rate']}, batch {usual['batch']}, {usual['updates']} "
            "updates"
        )
        for row in groups.iloc[1:].itertuples():
            same = (own[budget] == groups.loc[row.Index, budget]).all(axis=1)
            names = _listed(f"{arm} ({recipe})" for arm, recipe in own.loc[same, ["arm", "recipe"]].to_numpy())
            other = {name: groups.loc[row.Index, name] for name in budget if groups.loc[row.Index, name] != usual[name]}
            found.append(f"with {', '.join(f'{name} {value}' for name, value in other.items())}: {names}")
    return found


# --------------------------------------------------------------------------------------------------------- model cards


def _card(record: dict, records: dict[str, dict], arms: pd.DataFrame, cases: pd.DataFrame, weights: Path) -> list[str]:
    run, key = record["run"], record["key"]
    effective_recipe, data, arm = record.get("effective_recipe", run["recipe"]), record["data"], arms.loc[record["key"]]
    own = cases[cases["run"] == key]
    n = own["patient"].nunique()
    classes = _listed(own["class"])
    return [
        f"# Model card: {record['arm']}, run {key}",
        "",
        "After Mitchell et al. 2019 (arXiv 1810.03993); made by `kdlib.analysis.cards` from the run's manifest and metrics.",
        "",
        "## Model details",
        *_items(
            [
                f"network {run['model']}, {record['parameters']:,} parameters, slice by slice, classes: {classes}",
                f"recipe {effective_recipe['name']!r}: {_lesson(effective_recipe)}",
                f"teacher: {_taught(record, records)}",
                f"training: {arm['optimiser']}, learning rate {arm['learning rate']}, batch {arm['batch']}, "
                f"{arm['epochs']} epochs of {arm['steps an epoch']} steps, seed {run['seed']}, best epoch "
                f"{record['best']['epoch']} (validation Dice {record['best']['val_dice']:.3f})",
                f"size of the study: {run['profile']['reduced_from_thesis']}",
                f"weights: `{weights.name}`, {weights.stat().st_size:,} bytes, SHA-256 "
                f"`{hashlib.sha256(weights.read_bytes()).hexdigest()}`",
                f"code: commit {record['git']['commit'] or UNKNOWN}"
                + (" with uncommitted changes" if record["git"]["dirty"] else "")
                + f"; finished {record['finished']} on {record['device']}",
            ]
        ),
        "## Intended use",
        "",
        "Research on knowledge distillation: to be compared with the other arms of its study. **Not for clinical use**:"
        " not a medical device, not validated for diagnosis, treatment or any decision on a patient.",
        "",
        "## Factors",
        "",
        f"Scanner, protocol, contrast phase, age, sex and disease of the patients: {UNKNOWN}. Other fields of view, "
        "spacings or intensities than those of its training data are outside of what it was tested on.",
        "",
        "## Metrics",
        "",
        f"Per volume; mean over the patients of the test part with {LEVEL} interval "
        f"({interval_text(summarise(own, ['run'])['interval'])}); reasons in the protocol.",
        "",
        "## Training data",
        *_items(
            [
                f"{run['data']}, target {run['target']}: {_count(len(data['train']), 'volume')} to train on "
                f"({100 * run['fraction']:.0f} % of the training patients' labels), {len(data['val'])} to select by",
                f"fold {run['fold']}, split `{data['digest']}`; the cases are listed in the protocol",
                "the data set's terms bind the weights too: look there before passing them on",
            ]
        ),
        "## Evaluation data",
        *_items(
            [f"{_count(len(data['test']), 'volume')} of {_count(n, 'patient')}: the test part of fold {run['fold']}"]
        ),
        "## Quantitative analyses",
        *_markdown(_performance(own)),
        "Beside its teacher and the same network alone, on the same patients:",
        *_markdown(_beside(record, records, cases)),
        "## Known failures",
        "",
        "The worst test volumes by Dice:",
        *_markdown(_worst(own)),
        "## Ethical considerations",
        "",
        "It inherits the bias of the data set that it was trained on, and may draw a target where there is none.",
        "",
        "## Caveats and recommendations",
        *_items(
            [
                f"one training with one seed; {_count(n, 'test patient')}; the protocol of the study lists its limits",
                *(f"published fault kept: {FAULTS[switch]}" for switch in _kept(record)),
            ]
        ),
    ]


def _taught(record: dict, records: dict[str, dict]) -> str:
    run = record["run"]
    if not run["teacher"]:
        return "none"
    if _kind(record) == "random":
        return f"{run['teacher']} with random weights"
    return f"{run['teacher']} ({_kind(record)}), run {', '.join(_teachers(record, records)) or UNKNOWN}"


def _kind(record: dict) -> str:
    """Whether the teacher was trained, shuffled or random."""
    return record["run"]["recipe"].get("teacher", "trained")


def _teachers(record: dict, records: dict[str, dict]) -> list[str]:
    """Keys of the runs that taught; older manifests do not name them, and they are those of the same fold and model."""
    run = record["run"]
    if _kind(record) == "random":
        return []
    if "teachers" in record:
        return list(record["teachers"].values())
    names = (run["teacher"] or "").split("+")
    return [
        key
        for key, other in records.items()
        if other["run"]["model"] in names and other["run"]["recipe"]["name"] == "teacher"
        and all(other["run"][part] == run[part] for part in ("data", "target", "fold"))
        and other["run"]["seed"] == run["teacher_seed"]
    ]  # fmt: skip


def _performance(own: pd.DataFrame) -> pd.DataFrame:
    """Every metric with its interval, for all classes together and, where there are several, for each."""
    rows = []
    kinds = [("all", own)] if own["class"].nunique() == 1 else [("all", own), *own.groupby("class", sort=False)]
    for label, table in kinds:
        for name in dict.fromkeys(table["metric"]):
            found = summarise(table, ["run"], name).iloc[0]
            ends = "" if pd.isna(found["low"]) else f"{found['low']:.3f} to {found['high']:.3f}"
            metric = METRICS[name]
            rows.append(
                {
                    "class": label,
                    "metric": f"{metric.label} ({metric.unit})" if metric.unit else metric.label,
                    "mean": f"{found['mean']:.3f}" if found["n"] else "undefined",
                    f"{LEVEL} interval": ends,
                    "n": found["n"],
                }
            )
    return pd.DataFrame(rows)


def _beside(record: dict, records: dict[str, dict], cases: pd.DataFrame) -> pd.DataFrame:
    run = record["run"]
    alone = [
        key
        for key, other in records.items()
        if not other["run"]["teacher"] and other["run"]["recipe"]["name"] == "baseline"
        and all(other["run"][part] == run[part] for part in ("data", "target", "model", "fold", "fraction", "seed"))
        and other["run"]["protocol"]["name"] == run["protocol"]["name"]
    ]  # fmt: skip
    rows = []
    for role, keys in (("this model", [record["key"]]), ("teacher", _teachers(record, records)), ("alone", alone)):
        for key in keys:
            own = cases[cases["run"] == key]
            if len(own) and (key != record["key"] or role == "this model"):
                found = summarise(own, ["run"]).iloc[0]
                ends = f"{found['low']:.3f} to {found['high']:.3f}"
                rows.append(
                    dict(model=role, arm=records[key]["arm"], run=key, Dice=f"{found['mean']:.3f}", interval=ends)
                )
    return pd.DataFrame(rows)


def _worst(own: pd.DataFrame, count: int = 3) -> pd.DataFrame:
    wide = own.pivot_table(index=["patient", "case"], columns="metric", values="value", sort=False)
    wide = wide.sort_values("dice", kind="stable").head(count).reset_index()
    shown = [name for name in ("dice", "recall", "precision", "hd95", "truth_volume") if name in wide]
    for name in shown:
        wide[name] = wide[name].map(lambda value: "undefined" if pd.isna(value) else f"{value:.3f}")
    names = {name: f"{METRICS[name].label} ({METRICS[name].unit})".removesuffix(" ()") for name in shown}
    return wide[["patient", "case", *shown]].rename(columns=names)
