"""A study as a graph of jobs. `make study` checks its parameters, writes them to jobs/study.json, and starts

    snakemake --snakefile Snakefile --directory results/<study> --configfile results/<study>/jobs/study.json --cores 2

Each job is a notebook, run by `python -m kdlib run`. Teachers come first, T1 and T2 of each fold as two jobs. An
experiment has one job per fold and seed, not per method: the methods of one fold and seed share their teacher's pass.
Its aggregate notebook then finds every run done and draws; with one fold and one seed it is the only job.
A job ends with jobs/<job>/done.json, so that a notebook that fails leaves the last good copy of itself in place.
Nothing waits for the package's source: runs that are done stay done, and ONLY=<experiment> draws anew.
"""

import shutil
import sys
from itertools import product
from pathlib import Path

EXPERIMENTS, PARAMETERS, SHARED = config["experiments"], config["parameters"], config["shared"]
FOLDS, SEEDS = SHARED["folds"], SHARED["seeds"]
TRAINING = [name for name in EXPERIMENTS if name not in ("00_by_hand", "00_data", "06_figures")]
TEACHERS = {  # whose runs an experiment builds on; the cumulative correction trains its own at every step
    name: config["teachers"] if name in ("01_baseline", "02_distillation") else ["T1"]
    for name in TRAINING
    if name != "05_correction"
}
GPU = int(SHARED["device"].startswith("cuda") or (SHARED["device"] == "auto" and bool(shutil.which("nvidia-smi"))))
JOBS_AT_ONCE = max(1, len(TRAINING) * len(FOLDS) * len(SEEDS))
THREADS = max(1, config["cores"] // (JOBS_AT_ONCE if config["local"] and not GPU else 1))
RUN = (  # exec: a scheduler's SIGTERM to the shell reaches the notebook
    "exec {sys.executable:q} -P -m kdlib run {input.notebook:q} --output {params.executed:q}"
    " --record {output:q} {params.given:q}"
)


wildcard_constraints:
    experiment=r"\d\d[a-z]?_[a-z_]+",
    teacher="T1|T2",
    fold=r"\d+",
    seed=r"\d+",


def given(experiment, job=None, **changed):
    """The parameters of a notebook, as words of a command line; a per-fold job keeps its own tables and figures."""
    parameters = PARAMETERS[experiment] | {name: str(value) for name, value in changed.items()}
    if job:
        parameters["study"] += f"/jobs/{job}"
    return [word for name, value in parameters.items() for word in ("-p", name, value)]


def notebook(experiment):
    return str(Path(config["notebooks"], f"{experiment}.ipynb"))


def checked(wildcards):
    """The data are looked at first; a later look alone makes nothing run again."""
    return [ancient("jobs/00_data/done.json")] if "00_data" in EXPERIMENTS else []


def teachers(experiment, folds):
    pairs = product(TEACHERS.get(experiment, ()), folds)
    return [ancient(f"jobs/teacher-{teacher}-fold{fold}/done.json") for teacher, fold in pairs]


def runs(wildcards):
    """What an experiment's aggregate notebook waits for."""
    name = wildcards.experiment
    if len(FOLDS) * len(SEEDS) == 1 or name not in TRAINING:
        return teachers(name, FOLDS)
    return [f"jobs/{name}-fold{fold}-seed{seed}/done.json" for fold, seed in product(FOLDS, SEEDS)]


def ended(*names):
    """The ends of experiments: of all that were asked for, or after failures of those that there are."""
    files = [f"jobs/{name}/done.json" for name in names]
    return [file for file in files if Path(file).exists()] if config["ended"] else files


rule all:
    input:
        ended(*EXPERIMENTS),
        "jobs/report/done.json",


rule data:
    input:
        notebook=notebook("00_data"),
    output:
        "jobs/00_data/done.json",
    params:
        executed="notebooks/00_data.ipynb",
        given=given("00_data"),
        files=config["files"],
    shell:
        RUN


rule teacher:
    input:
        checked,
        notebook=ancient(notebook("01_baseline")),
    output:
        "jobs/teacher-{teacher}-fold{fold}/done.json",
    params:
        executed="jobs/teacher-{teacher}-fold{fold}/01_baseline.ipynb",
        given=lambda wildcards: given(
            "01_baseline", f"teacher-{wildcards.teacher}-fold{wildcards.fold}",
            networks=wildcards.teacher, folds=wildcards.fold, seeds=SEEDS[0],
        ),
        files=config["files"],
    threads: THREADS
    resources:
        gpu=GPU,
    priority: 2
    shell:
        RUN


rule fold_and_seed:
    input:
        checked,
        lambda wildcards: teachers(wildcards.experiment, [wildcards.fold]),
        notebook=lambda wildcards: ancient(notebook(wildcards.experiment)),
    output:
        "jobs/{experiment}-fold{fold}-seed{seed}/done.json",
    params:
        executed="jobs/{experiment}-fold{fold}-seed{seed}/{experiment}.ipynb",
        given=lambda wildcards: given(
            wildcards.experiment, f"{wildcards.experiment}-fold{wildcards.fold}-seed{wildcards.seed}",
            folds=wildcards.fold, seeds=wildcards.seed,
        ),
        files=config["files"],
    threads: THREADS
    resources:
        gpu=GPU,
    priority: 1
    shell:
        RUN


rule experiment:
    input:
        checked,
        runs,
        notebook=lambda wildcards: notebook(wildcards.experiment),
    output:
        "jobs/{experiment}/done.json",
    params:
        executed="notebooks/{experiment}.ipynb",
        given=lambda wildcards: given(wildcards.experiment),
        files=config["files"],
    threads: THREADS
    resources:
        gpu=GPU,
    shell:
        RUN


rule figures:
    input:
        ended(*TRAINING),
        notebook=notebook("06_figures"),
    output:
        "jobs/06_figures/done.json",
    params:
        executed="notebooks/06_figures.ipynb",
        given=given("06_figures"),
    shell:
        RUN


rule report:
    input:
        ended(*EXPERIMENTS),
        notebook=notebook("report"),
    output:
        "jobs/report/done.json",
    shell:
        "exec {sys.executable:q} -P -m kdlib report \"$PWD\" --notebook {input.notebook:q} --record {output:q}"


ruleorder: data > figures > experiment
