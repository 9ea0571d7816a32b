"""A study as a graph of jobs. `make study` checks its parameters, writes them to jobs/study.json, and starts

    snakemake --snakefile Snakefile --directory results/<study> --configfile results/<study>/jobs/study.json --cores 2

Every job is a notebook in the project's strict papermill, so that the same command runs it by hand. Teachers come first,
T1 and T2 of each fold as two jobs. An experiment is cut by fold and seed, not by arm: the arms of one fold and seed share
their teacher's pass. Its wide notebook then finds every run done and draws; with one fold and one seed it is the job.
A job's end is jobs/<job>/done.json, so that a notebook that fails leaves the last good copy of itself in place.
"""

import sys
from itertools import product
from pathlib import Path

ROOT = Path(workflow.basedir)
EXPERIMENTS, PARAMETERS = config["experiments"], config["parameters"]
FOLDS, SEEDS = config["folds"], config["seeds"]
TEACHERS = {  # whose runs an experiment builds on; the bridge trains teachers of its own at every stage
    "01_baseline": ("T1", "T2"),
    "02_distillation": ("T1", "T2"),
    "03_ablation": ("T1",),
    "04_loss_comparison": ("T1",),
}
TRAINING = [name for name in EXPERIMENTS if name not in ("00_data", "06_figures")]
FIGURES = ["jobs/06_figures/done.json"] if "06_figures" in EXPERIMENTS else []
RUN = (  # exec: a scheduler's SIGTERM to the shell is the notebook's
    "exec {sys.executable:q} -P -m kdlib.apps.notebooks run {input.notebook:q} --output {params.executed:q} --record {output:q}"
    " {params.words:q}"
)


wildcard_constraints:
    experiment=r"0\d_[a-z_]+",
    teacher="T1|T2",
    fold=r"\d+",
    seed=r"-?\d+",


def values(experiment, **changed):
    """The parameters of a notebook, as words of a command line."""
    parameters = PARAMETERS[experiment] | {name: str(value) for name, value in changed.items()}
    return [word for name, value in parameters.items() for word in ("-p", name, value)]


def narrow(experiment, job, **changed):
    """The same for a job that is cut out of a study: its tables and figures stay with it."""
    return values(experiment, study=f"{PARAMETERS[experiment]['study']}/jobs/{job}", **changed)


def notebook(experiment):
    return Path(config["notebooks"], f"{experiment}.ipynb")


def data(wildcards):
    return ["jobs/00_data/done.json"] if "00_data" in EXPERIMENTS else []


def teachers(experiment, folds):
    pairs = product(TEACHERS.get(experiment, ()), folds)
    return [f"jobs/teacher-{teacher}-fold{fold}/done.json" for teacher, fold in pairs]


def runs(experiment):
    """What an experiment's wide notebook waits for."""
    if len(FOLDS) * len(SEEDS) == 1:
        return teachers(experiment, FOLDS)
    return expand(f"jobs/{experiment}-fold{{fold}}-seed{{seed}}/done.json", fold=FOLDS, seed=SEEDS)


def ended(wildcards):
    """The experiments that figures and report are made of: all of them, or after failures what there is."""
    files = [f"jobs/{name}/done.json" for name in TRAINING]
    return [file for file in files if Path(file).exists()] if config["ended"] else files


def sources(wildcards):
    """What drawing depends on; a run that is done stays done, whatever version of the code made it."""
    return sorted((ROOT / "kdlib").rglob("*.py"))


rule all:
    input:
        data,
        ended,
        FIGURES,
        ["report.html"] if config["report"] else [],


rule data:
    input:
        notebook=lambda wildcards: notebook("00_data"),
        sources=sources,
    output:
        "jobs/00_data/done.json",
    params:
        executed="notebooks/00_data.ipynb",
        words=lambda wildcards: values("00_data"),
        state=config["state"],
    shell:
        RUN


rule teacher:
    input:
        data,
        notebook=lambda wildcards: notebook("01_baseline"),
    output:
        "jobs/teacher-{teacher}-fold{fold}/done.json",
    params:
        executed="jobs/teacher-{teacher}-fold{fold}/01_baseline.ipynb",
        words=lambda wildcards: narrow(
            "01_baseline", f"teacher-{wildcards.teacher}-fold{wildcards.fold}",
            networks=wildcards.teacher, folds=wildcards.fold, seeds=SEEDS[0],
        ),
        state=config["state"],
    threads: config["threads"]
    resources:
        gpu=config["gpu"],
    priority: 2
    shell:
        RUN


rule place:
    input:
        data,
        lambda wildcards: teachers(wildcards.experiment, [wildcards.fold]),
        notebook=lambda wildcards: notebook(wildcards.experiment),
    output:
        "jobs/{experiment}-fold{fold}-seed{seed}/done.json",
    params:
        executed="jobs/{experiment}-fold{fold}-seed{seed}/{experiment}.ipynb",
        words=lambda wildcards: narrow(
            wildcards.experiment, f"{wildcards.experiment}-fold{wildcards.fold}-seed{wildcards.seed}",
            folds=wildcards.fold, seeds=wildcards.seed,
        ),
        state=config["state"],
    threads: config["threads"]
    resources:
        gpu=config["gpu"],
    priority: 1
    shell:
        RUN


rule experiment:
    input:
        data,
        lambda wildcards: runs(wildcards.experiment),
        notebook=lambda wildcards: notebook(wildcards.experiment),
        sources=sources,
    output:
        "jobs/{experiment}/done.json",
    params:
        executed="notebooks/{experiment}.ipynb",
        words=lambda wildcards: values(wildcards.experiment),
        state=config["state"],
    threads: config["threads"]
    resources:
        gpu=config["gpu"],
    shell:
        RUN


rule figures:
    input:
        ended,
        notebook=lambda wildcards: notebook("06_figures"),
        sources=sources,
    output:
        "jobs/06_figures/done.json",
    params:
        executed="notebooks/06_figures.ipynb",
        words=lambda wildcards: values("06_figures"),
    shell:
        RUN


rule report:
    input:
        ended,
        FIGURES,
        sources=sources,
    output:
        "report.html",
    log:
        "jobs/report.log",
    shell:
        "{sys.executable:q} -P -m kdlib.apps.report \"$PWD\" > {log:q} 2>&1"


ruleorder: data > figures > experiment
