"""What a reviewer asks of a study, read off its runs' manifests and tables: its protocol, and a model card per student.

Nothing here is typed by hand: a number that no manifest or table holds is "not recorded". `facts` and `card_facts` hold
what is said, the templates beside this file how.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from kdlib.analysis.comparisons import ALPHA, SAME
from kdlib.analysis.intervals import interval_text
from kdlib.analysis.labels import method_labels, percent
from kdlib.analysis.sentences import many
from kdlib.analysis.tables import markdown_table, summarise
from kdlib.config import LOGIT_CUT, SWITCHES, InputError, Run, from_json
from kdlib.files import read_csv, write_text
from kdlib.metrics import METRICS
from kdlib.recipe import MOST

UNKNOWN = "not recorded"
FAULTS = {  # switches of a protocol -> the published fault that each one keeps
    "own_optimisers": "teacher, baseline and distilled students differ in optimiser, learning rate, batch and loss",
    "byte_image": "intensities are clipped to 0..255 whatever they mean; no window, spacing or orientation",
    "redrawn_projectors": "projections of features are drawn anew at every step and never trained",
    "one_channel_softmax": "the prediction-map term takes a softmax over one channel, so that it is always 0",
    "unlabelled_contrast": "the contrast sees one vector per slice and no labels",
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


def write_cards(folder: Path | str, manifests: Mapping[str, dict]) -> list[Path]:
    """Writes `<folder>/protocol.md` and `<folder>/cards/<method>-<key>.md`, one per student whose weights are kept.

    Args:
        folder: of a study, with `tables/*_{cases,history}.csv`; the frozen splits lie in `splits` beside it.
        manifests: key -> manifest of every finished run of these tables, and of their teachers.

    Returns: the files, the protocol first.

    Raises: InputError: the study has no table of cases, or runs of it have no manifest.
    """
    folder = Path(folder)
    cases = _tables(folder, "cases").drop_duplicates(["run", "case", "class", "metric"], ignore_index=True)
    missing = cases.loc[~cases["run"].isin(list(manifests)), "run"].unique()
    if len(missing):
        known = f"{len(missing)} of {cases['run'].nunique()} runs of its tables have no usable manifest"
        raise InputError(f"study {folder.name}: {known} ({', '.join(missing[:8])}): run the study again")
    runs = _runs(folder, manifests)
    pages = templates("kdlib.analysis")
    written = [folder / "protocol.md"]
    write_text(written[0], pages.get_template("protocol.md.j2").render(facts(folder, manifests, runs, cases)))
    for key in _students(runs, cases).index:
        if "best.safetensors" in manifests[key]["files"]:
            name = re.sub(r"[^a-z0-9]+", "-", runs.loc[key, "label"].lower()).strip("-")
            written.append(folder / "cards" / f"{name}-{key}.md")
            text = pages.get_template("card.md.j2").render(card_facts(key, manifests, runs, cases))
            write_text(written[-1], text)
    return written


def templates(package: str) -> Environment:
    """The pages that lie in a package's `templates/`."""
    found = Environment(
        loader=PackageLoader(package), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    found.filters |= {"table": markdown_table, "listed": _listed, "percent": percent}
    return found


# -------------------------------------------------------------------------------------------------------------- tables


def _tables(folder: Path, part: str) -> pd.DataFrame:
    """All `tables/<experiment>_<part>.csv` of a study below each other, but those of the data itself."""
    paths = [path for path in sorted((folder / "tables").glob(f"*_{part}.csv")) if path.name != "00_data_cases.csv"]
    if not paths:
        raise InputError(f"{folder / 'tables'} holds no *_{part}.csv: run a notebook of this study first")
    return pd.concat(map(read_csv, paths), ignore_index=True)


def _listed(values: Iterable[object]) -> str:
    """Distinct values in order, e.g. "0, 1"."""
    return ", ".join(map(str, dict.fromkeys(values)))


def _grouped(rows: Iterable[dict]) -> pd.DataFrame:
    """Equal rows as one, with how many runs they stand for."""
    table = pd.DataFrame(rows).fillna(UNKNOWN)
    return table.groupby(list(table), sort=False, as_index=False).size().rename(columns={"size": "runs"})


def _runs(folder: Path, manifests: Mapping[str, dict]) -> pd.DataFrame:
    """One row per run, by key: its identity, label, the run itself, and its budget."""
    epochs = _tables(folder, "history").groupby("run")["epoch"].max()
    rows = []
    for key, record in manifests.items():
        run = from_json(record["run"])
        how = run.optimisation
        budget = {
            "parameters": record["parameters"], "optimiser": f"{how.optimiser}, {how.schedule}",
            "learning rate": f"{how.lr:g}", "batch": how.batch, "epochs": epochs.get(key, UNKNOWN),
            "updates": record["steps"], "seconds": record["seconds"]["training"],
        }  # fmt: skip
        # which older manifests lack
        about = record["identity"] | {"length": run.length, "dimensions": run.preprocessing.dimensions}
        rows.append(about | {"recipe": recipe_text(run)} | budget | {"run": run})
    found = pd.DataFrame(rows, index=list(manifests))
    return found.assign(label=found["method"].map(method_labels(found.drop(columns="recipe"))))


def recipe_text(run: Run) -> str:
    """What a run learns from, in words: the effective recipe, with the faults that the protocol keeps."""
    recipe = run.effective_recipe
    parts = [f"{recipe.segmentation} x {recipe.segmentation_weight:g}"]
    if recipe.reconstruction_weight:
        parts.append(f"reconstruction x {recipe.reconstruction_weight:g}")
    for term in recipe.terms:
        heat = "" if term.temperature is None else f", temperature {term.temperature:g}"
        kind = "" if term.projector == "learned" else f", {term.projector} projectors"
        parts.append(f"{term.name} ({term.loss}{heat}{kind}) x {term.weight:g}")
    if recipe.redrawn_projectors:
        parts.append("projectors redrawn at every step")
    if recipe.unlabelled:
        parts.append("pseudo-labels" if recipe.pseudo_labels else "unlabelled slices in half of each batch")
    if recipe.smoothing:
        parts.append(f"labels of the cross entropy smoothed by {recipe.smoothing:g}")
    if run.teacher and recipe.teacher != "trained":
        parts.append(f"{recipe.teacher} teacher")
    if recipe.budget != "student":
        parts.append({"teacher+student": "longer training", "wall_clock": "equal wall-clock time"}[recipe.budget])
    if recipe.balance:
        limit = f"at most {MOST} times the first weight"
        parts.append(f"terms balanced to {recipe.balance:g} of the segmentation's gradient, {limit}")
    return " + ".join(parts)


# ------------------------------------------------------------------------------------------------------------ protocol


def facts(folder: Path, manifests: Mapping[str, dict], runs: pd.DataFrame, cases: pd.DataFrame) -> dict[str, object]:
    """All that the protocol says."""
    records, every = list(manifests.values()), list(runs["run"])
    parts, n = _parts(folder, manifests, runs), cases.loc[cases["metric"] == "dice", "patient"].nunique()
    students, by_part = _students(runs, cases), list(parts.groupby(["fold", "part"], sort=False))
    flow = [(("all", "all that these runs saw"), parts), *by_part]
    finished = sorted(record["finished"] for record in records)
    budgets = ["label", "recipe", "protocol", "parameters", "optimiser", "learning rate", "batch", "epochs", "updates"]
    groups = runs.groupby(budgets, sort=False, as_index=False)
    return {
        "study": folder.name, "runs": many(len(records), "run"), "first": finished[0], "last": finished[-1],
        "limits": _limits(records, runs, students, parts, n),
        "data": _listed(run.data for run in every), "target": _listed(run.target for run in every),
        "stops_at_defects": all(run.on_defect == "raise" for run in every),
        "flow": pd.DataFrame([{"fold": fold, "part": part} | _sizes(rows) for (fold, part), rows in flow]),
        "folds": max(run.profile.folds for run in every), "tested": sorted(parts["fold"].unique()),
        "digests": _listed(f"`{digest}`" for digest in parts["digest"]), "leaks": _leaks(parts),
        "parts": {f"Fold {fold}, {part}": (_sizes(rows), _listed(rows["case"])) for (fold, part), rows in by_part},
        "preprocessing": _grouped(_view(run) for run in every),
        "budgets": groups.agg(
            folds=("fold", lambda found: _listed(sorted(found))), seeds=("seed", lambda found: _listed(sorted(found))),
            runs=("seconds", "size"), seconds=("seconds", lambda found: round(found.mean(), 1)),
        ),
        "seeds": {
            name: _listed(sorted(runs.loc[chosen, "seed"])) or "none"
            for name, chosen in (("students", students.index), ("teachers", runs["role"] == "teacher"))
        },
        "rules": list(dict.fromkeys(map(_rule, every))),
        "metrics": _metrics(cases), "alpha": ALPHA, "same": SAME["dice"], "families": _families(folder),
        "intervals": interval_text(summarise(cases, ["run"])["interval"]), "patients": n,
        "machines": _grouped(map(_machine, records)), "code": _grouped(map(_code, records)),
    }  # fmt: skip


def _parts(folder: Path, manifests: Mapping[str, dict], runs: pd.DataFrame) -> pd.DataFrame:
    """One row per (split, fold, part, case): digest, fold, part, case, patient, slices.

    Patients come from the frozen split that the manifests name by its digest, else from the study's table of cases.
    """
    patients: dict[tuple[str, str], str] = {}
    for path in sorted((folder.parent / "splits").glob("*.json")):
        text = path.read_bytes()
        digest = hashlib.sha256(text).hexdigest()
        patients |= {(digest, name): case["patient"] for name, case in json.loads(text)["cases"].items()}
    table = folder / "tables" / "00_data_cases.csv"
    volumes = read_csv(table).set_index("case") if table.is_file() else None
    rows = []
    for key, record in manifests.items():
        data, run = record["data"], runs.loc[key, "run"]
        name = "training" if run.fraction == 1 else f"training, {100 * run.fraction:g} % of the labels"
        for part, label in (("train", name), ("val", "validation"), ("test", "test")):
            rows += [(data["digest"], run.fold, label, str(case)) for case in data[part]]
    found = pd.DataFrame(rows, columns=["digest", "fold", "part", "case"]).drop_duplicates(ignore_index=True)
    known = dict(volumes["patient"]) if volumes is not None else {}
    pairs = zip(found["digest"], found["case"], strict=True)
    found["patient"] = [patients.get(pair) or known.get(pair[1], pair[1]) for pair in pairs]
    return found.assign(slices=found["case"].map(volumes["z"]) if volumes is not None else float("nan"))


def _sizes(parts: pd.DataFrame) -> dict[str, object]:
    """Patients, volumes and slices of some rows of `_parts`, each counted once."""
    once = parts.drop_duplicates("case")
    slices = int(once["slices"].sum()) if once["slices"].notna().all() else UNKNOWN
    return {"patients": once["patient"].nunique(), "volumes": len(once), "axial slices": slices}


def _leaks(parts: pd.DataFrame) -> list[str]:
    """Patients that are tested and also seen by training or selection, in one fold."""
    found = []
    for _, fold in parts.groupby(["digest", "fold"]):
        tested = fold["part"] == "test"
        found += sorted(set(fold.loc[tested, "patient"]) & set(fold.loc[~tested, "patient"]))
    return found


def _view(run: Run) -> dict[str, object]:
    view = run.preprocessing
    spacing = "the volume's own" if view.spacing is None else f"{view.spacing:g} mm"
    seen = {
        "slice or patch": " x ".join([str(view.size)] * view.dimensions), "spacing": spacing, "channels": view.channels,
        "CT window (HU)": "{:g} to {:g}".format(*view.window),
        "MR percentiles": "{:g} to {:g}".format(*view.percentiles),
    }  # fmt: skip
    none = {"spacing": "ignored", "CT window (HU)": "none", "MR percentiles": "none"}
    return seen | none if view.published else seen


def _rule(run: Run) -> str:
    """How the best epoch of a run was chosen."""
    part = "test" if run.protocol.test_selection else "validation"
    how = "of the pixels of all its slices together" if run.protocol.pooled_dice else "by volume, averaged"
    cut = f"{LOGIT_CUT:.2f} (logit 0.5)" if run.protocol.logit_threshold else "0.5, or the likeliest class"
    return f"{run.protocol.name}: Dice of the {part} part after each epoch, {how}, cut at {cut}"


def _metrics(cases: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for name, values in cases.groupby("metric", sort=False)["value"]:
        label, unit, higher = METRICS[name]
        better = {True: "more", False: "less", None: "neither"}[higher]
        row = {"metric": label, "unit": unit or "1", "better": better, "values": len(values)}
        rows.append(row | {"undefined": int(values.isna().sum()), "why": WHY[name]})
    return pd.DataFrame(rows)


def _families(folder: Path) -> pd.DataFrame:
    """One row per family of comparisons, a table or a question of it: what its tests could decide, and did."""
    rows = []
    for path in sorted((folder / "tables").glob("*.csv")):
        columns = {"verdict", "n", "smallest_p"}
        if path.stem.endswith("_answer") or not columns <= set(pd.read_csv(path, nrows=0)):
            continue
        table = read_csv(path)
        if "class" in table and table["class"].nunique() == 1:  # as in <chapter>_answer, what <chapter>_comparisons has
            continue
        table = table.dropna(subset=["verdict"])
        for question, family in table.groupby("question", sort=False) if "question" in table else [("", table)]:
            least, verdicts = family["smallest_p"].min(), family["verdict"].value_counts(sort=False)
            rows.append({
                "family": f"{path.stem}, {question}".removesuffix(", "), "comparisons": len(family),
                "patients": _listed(family["n"].astype(int)),
                "smallest possible adjusted p": f"{least:.2g}",
                "can decide": "yes" if least < ALPHA else "no, whatever the data: too few patients",
                "verdicts": ", ".join(f"{count} {word}" for word, count in verdicts.items()),
            })  # fmt: skip
    return pd.DataFrame(rows)


def _machine(record: dict) -> dict[str, object]:
    return {
        "device": record["device"], "CPU": record.get("hardware", {}).get("cpu", UNKNOWN),
        "threads": record.get("threads", UNKNOWN), "precision": record["precision"],
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }  # fmt: skip


def _code(record: dict) -> dict[str, object]:
    git = record["git"]
    return {
        "commit": git["commit"] or UNKNOWN,
        "tree": {True: "with uncommitted changes", False: "clean", None: UNKNOWN}[git["dirty"]],
        "hash of the code that can change a result": record.get("code", {}).get("hash", UNKNOWN),
    }


def _students(runs: pd.DataFrame, cases: pd.DataFrame) -> pd.DataFrame:
    """The runs of tested students: no teacher, nor what was trained to teach alone, as a self-distilled one's peer."""
    return runs[(runs["role"] != "teacher") & runs.index.isin(cases["run"])]


def _limits(records: list[dict], runs: pd.DataFrame, students: pd.DataFrame, parts: pd.DataFrame, n: int) -> list[str]:
    """What a reader must know before believing a number of `n` test patients, each line drawn from the manifests."""
    every = list(runs["run"])
    sizes = dict.fromkeys(run.profile.reduced_from_thesis for run in every)
    found = [f"size: {words}" for words in sizes if words != "nothing"]
    folds = max(run.profile.folds for run in every)
    if (tested := sorted(parts["fold"].unique())) != list(range(folds)):
        tested = f"only fold {_listed(tested)} of {folds} was tested"
        found.append(f"{tested}: {many(n, 'patient')}, not the whole data set")
    if n < 24:
        found.append(f"{n} test patients: intervals are wide, and only large differences can be shown at all")
    if leaks := _leaks(parts):
        found.append(f"LEAKAGE: {many(len(leaks), 'patient')} in the test part and in another of the same fold")
    counts = students.groupby(["method", "protocol", "fold"])["seed"].nunique()
    if counts.max() == 1:
        found.append("one seed per method: intervals speak of these trainings, not of the method trained anew")
    elif counts.min() < counts.max():
        found.append(f"methods have {counts.min()} to {many(counts.max(), 'seed')} per fold")
    found += _unequal(runs)
    for switch in SWITCHES:
        kept = list(dict.fromkeys(run.protocol.name for run in every if getattr(run.protocol, switch)))
        if kept:
            those = f"protocol {kept[0]!r}" + (f" to {kept[-1]!r}, {len(kept)} protocols" if len(kept) > 1 else "")
            found.append(f"published fault kept by {those}: {FAULTS[switch]}")
    dirty = sum(record["git"]["dirty"] is not False for record in records)
    if dirty:
        found.append(f"{dirty} of {len(records)} runs were made with uncommitted changes, or outside a checkout")
    if split := sum(record.get("micro_batches", 1) > 1 for record in records):
        found.append(f"the batches of {many(split, 'run')} were split to fit the memory")
    for name, section, values in (
        ("versions of the code", "Code", {record["git"]["commit"] for record in records}),
        ("devices", "Hardware and versions", {record["device"] for record in records}),
        ("sets of library versions", "Hardware and versions", {str(sorted(r["versions"].items())) for r in records}),
    ):
        if len(values) > 1:
            found.append(f"the runs come from {len(values)} {name}: see {section}")
    return [*found, "one data set, no external test data; training patients are shared between folds and methods"]


def _unequal(runs: pd.DataFrame) -> list[str]:
    """Students, and teachers, whose budget is not that of most of their kind."""
    found, budget = [], ["optimiser", "learning rate", "batch", "updates"]
    for kind, own in runs.groupby(runs["role"].map({"teacher": "teachers"}).fillna("students")):
        groups = own.groupby(budget, sort=False)["label"].agg(
            size="size", methods=lambda labels: "; ".join(dict.fromkeys(labels))
        )
        groups = groups.sort_values("size", ascending=False, kind="stable").reset_index()
        usual = groups.iloc[0]
        for number, row in groups.iloc[1:].iterrows():
            if number == 1:
                texts = f"{usual['optimiser']}, learning rate {usual['learning rate']}, batch {usual['batch']}"
                most = f"most ({usual['size']} of {len(own)} runs) have {texts}, {usual['updates']} updates"
                found.append(f"the {kind} do not all have the same budget; {most}")
            other = ", ".join(f"{name} {row[name]}" for name in budget if row[name] != usual[name])
            found.append(f"with {other}: {row['methods']}")
    return found


# --------------------------------------------------------------------------------------------------------- model cards


def card_facts(key: str, manifests: Mapping[str, dict], runs: pd.DataFrame, cases: pd.DataFrame) -> dict[str, object]:
    """All that the model card of one run says."""
    record, row = manifests[key], runs.loc[key]
    own, run = cases[cases["run"] == key], row["run"]
    random = run.teacher and run.effective_recipe.teacher == "random"
    teachers = [] if random else list(record["teachers"].values())
    alike = ["model", "fold", "seed", "fraction", "length", "protocol", "dimensions"]
    baselines = runs.index[(runs["role"] == "baseline") & (runs[alike] == row[alike]).all(axis=1)]
    compared = [("this model", key), *(("teacher", other) for other in teachers)]
    compared += [("without a teacher", other) for other in baselines if other != key]
    return {
        "key": key, "label": row["label"], "run": run, "record": record, "row": row, "unknown": UNKNOWN,
        "teacher": f"{run.teacher} with random weights" if random else
        f"{run.teacher} ({run.effective_recipe.teacher}), run {_listed(teachers)}" if run.teacher else "none",
        "code": _code(record), "classes": _listed(own["class"]),
        "patients": many(own["patient"].nunique(), "patient"),
        "interval": interval_text(summarise(own, ["run"])["interval"]), "performance": performance(own),
        "beside": pd.DataFrame([
            {"model": role, "method": runs.loc[other, "label"], "run": other} | _cells(cases[cases["run"] == other])
            for role, other in compared
            if (cases["run"] == other).any()
        ]).rename(columns={"mean": METRICS["dice"].label}),
        "worst": worst(own), "faults": [FAULTS[switch] for switch in SWITCHES if getattr(run.protocol, switch)],
    }  # fmt: skip


def _cells(rows: pd.DataFrame, metric: str = "dice") -> dict[str, object]:
    """Mean over patients of a run's metric and its interval, printed."""
    found = summarise(rows, ["run"], metric).iloc[0]
    ends = "" if pd.isna(found["low"]) else f"{found['low']:.3f} to {found['high']:.3f}"
    mean = f"{found['mean']:.3f}" if found["n"] else "undefined"
    return {"mean": mean, "95 % interval": ends, "n": found["n"]}


def performance(own: pd.DataFrame) -> pd.DataFrame:
    """Every metric with its interval, for all classes together and, where there are several, for each."""
    kinds = [("all", own)] if own["class"].nunique() == 1 else [("all", own), *own.groupby("class", sort=False)]
    return pd.DataFrame([
        {"class": label, "metric": METRICS[name].heading} | _cells(table, name)
        for label, table in kinds
        for name in table["metric"].unique()
    ])  # fmt: skip


def worst(own: pd.DataFrame) -> pd.DataFrame:
    """The three worst volumes by Dice, mean over classes."""
    wide = own.pivot_table(index=["patient", "case"], columns="metric", values="value", sort=False)
    wide = wide.sort_values("dice", kind="stable").head(3).reset_index()
    shown = [name for name in ("dice", "recall", "precision", "hd95", "truth_volume") if name in wide]
    for name in shown:
        wide[name] = wide[name].map(lambda value: "undefined" if pd.isna(value) else f"{value:.3f}")
    return wide[["patient", "case", *shown]].rename(columns={name: METRICS[name].heading for name in shown})
