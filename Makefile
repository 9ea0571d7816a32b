# Needs git, make and Python >= 3.11; all else is set up in .venv, at the versions of requirements.lock.

.DEFAULT_GOAL := help
.PHONY: help study site check test bench lab lock strip clean FORCE

DATA ?= phantom
TARGET ?= spleen
PROFILE ?= quick
PROTOCOL ?= corrected
CHANGES ?= {}
ON_DEFECT ?= raise
GROUP ?= auto
FOLDS ?= 0
SEEDS ?= 0
DEVICE ?= auto
RESULTS ?= results
STUDY ?=
ONLY ?=
DRY ?=
CORES ?=
QUICK ?=
LONG ?=
COVER ?=
CLUSTER ?=
SNAKEMAKE_ARGS ?=
LAB ?=
PYTHON ?=

# Values reach the recipes through the environment, unexpanded: blanks, quotes and $ in a path are plain text.
VARIABLES := DATA TARGET PROFILE PROTOCOL CHANGES ON_DEFECT GROUP FOLDS SEEDS DEVICE RESULTS STUDY ONLY DRY CORES QUICK LONG COVER CLUSTER SNAKEMAKE_ARGS LAB PYTHON
$(foreach name,$(VARIABLES),$(eval override $(name) := $$(value $(name))))
export $(VARIABLES)
# Threads that wait must not spin: on a shared machine that costs more than all the rest.
export OMP_WAIT_POLICY ?= PASSIVE

define HELP
make study   run the experiments and write report.html; what is finished is kept, so a stopped study resumes
make site    write the pages of the studies in RESULTS into docs/site, and what they found into README.md and docs/
make check   run the quick unit tests, in about a minute
make test    run all tests; with COVER=1 measure which lines they reach
make bench   measure kdlib against plain ways and other code, into results/benchmarks/ (a quarter of an hour)
make lab     open notebooks/explore.ipynb in JupyterLab, on 127.0.0.1 and behind a token
make strip   remove outputs from notebooks/ before a commit
make lock    regenerate requirements.lock (needs python3.11, the oldest Python that it must serve)
make clean   remove the environment and caches, never results

Variables, e.g. make study DATA=/data/Task09_Spleen PROFILE=ct128 FOLDS="0 1 2 3"
  DATA      phantom     a folder in Decathlon layout, or phantom
  TARGET    spleen      label names joined by ",", or all
  PROFILE   quick       size of slices, networks and trainings: quick, hippocampus, hippocampus3d, ct96, ct128, thesis
  PROTOCOL  corrected   corrected, or thesis: with the faults of the published study
  CHANGES   {}          fields of the profile to change, as JSON, e.g. CHANGES='{"size": 64, "spacing": 5.0}'
  ON_DEFECT raise       raise: stop at defective cases; drop: leave them out and list them
  GROUP     auto        how cases are grouped into patients: a regular expression, or a CSV of case and patient
  FOLDS     0           outer folds to train
  SEEDS     0           seeds of the students; teachers have seed 0
  DEVICE    auto        auto, cpu or cuda
  RESULTS   results     folder of trained runs and of studies
  STUDY                 name of the study's folder in RESULTS; made from data, target, profile, protocol and changes when empty
  ONLY                  experiments to run, e.g. ONLY="00_data 01_baseline"; when empty all but 05 and 07 to 11, which train most
  DRY                   DRY=1 lists what would be trained, and for how long
  CORES                 CPUs that the jobs share (on a cluster those of one job); when empty all that there are (2)
  CLUSTER               where the jobs run instead of here: slurm, or another executor plugin of Snakemake
  SNAKEMAKE_ARGS        more options for Snakemake, e.g. SNAKEMAKE_ARGS="--default-resources runtime=600 mem_mb=8000"
  QUICK                 QUICK=1 tries every benchmark in small, in about a minute
  LONG                  LONG=1 measures also what takes an hour; with DATA, the time to a Dice on that data set
  COVER                 COVER=1 measures which lines of kdlib the tests reach; they then take longer
  LAB                   more options for JupyterLab, e.g. LAB="--no-browser --port=8890"
  PYTHON                the interpreter that .venv is made with; the newest that is found when empty
endef
export HELP

help:
	@printf '%s\n' "$$HELP"

# The stamp holds the folder it was made in: a moved, half-made or broken environment is made again from nothing,
# a changed pyproject.toml or requirements.lock only updates it.
# All but PyTorch, of which there are CPU and CUDA builds, is checked against the hashes of requirements.lock; what
# pyproject.toml asks for is then there, so that the second pip adds PyTorch at its locked version, and kdlib.
STAMP := .venv/.complete
UNHASHED := /^torch(vision)?==/
whole := $(shell [ "$$(cat $(STAMP) 2>/dev/null)" = "$$(pwd -P)" ] && .venv/bin/python -c "" 2>/dev/null && echo yes)

$(STAMP): pyproject.toml requirements.lock $(if $(whole),,FORCE)
ifneq ($(whole),yes)
	@if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; else set -- python3.13 python3.12 python3.11 python3; fi; \
	for python; do \
	    "$$python" -c "import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && break; python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "error: need Python 3.11 or newer with its venv module ($$* will not do): install it, on Debian and" \
	        "Ubuntu by apt-get install python3 python3-venv, or name one by PYTHON=" >&2; exit 1; \
	fi; \
	echo "setting up .venv with $$python (downloads PyTorch: some minutes)"; \
	rm -rf .venv && "$$python" -m venv .venv
endif
	@rm -f $(STAMP)
	@sed -E -e '$(UNHASHED)d' requirements.lock > .venv/hashed && \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r .venv/hashed
	@sed -E -e '/^ /d' -e 's/ *\\$$//' requirements.lock > .venv/versions && \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c .venv/versions -e ".[dev,deploy]"
	@pwd -P > $(STAMP)

study: $(STAMP)
	@if [ -n "$$DRY" ]; then set -- dry-run; else set -- study $${CORES:+--cores="$$CORES"} \
	    $${CLUSTER:+--executor="$$CLUSTER"} $${SNAKEMAKE_ARGS:+--snakemake-args="$$SNAKEMAKE_ARGS"}; fi; \
	.venv/bin/python -m kdlib "$$@" --data="$$DATA" --target="$$TARGET" --profile="$$PROFILE" --protocol="$$PROTOCOL" \
	    --changes="$$CHANGES" --on-defect="$$ON_DEFECT" --group="$$GROUP" --folds="$$FOLDS" --seeds="$$SEEDS" \
	    --device="$$DEVICE" --results="$$RESULTS" --study="$$STUDY" $${ONLY:+--only $$ONLY}

site: $(STAMP)
	@.venv/bin/python -m kdlib site --results="$$RESULTS" --output=docs/site --block README.md answer hippocampus \
	    --block README.md losses hippocampus --block README.md when conclusion --block docs/protocol.md worth btcv-correction

check: $(STAMP)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto -m "not slow" tests/unit

test: $(STAMP)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -rsfE --durations=15 -n auto --dist loadfile --max-worker-restart=0 \
	    $${COVER:+--cov=kdlib --cov-report=term:skip-covered}

bench: $(STAMP)
	@if [ "$$DATA" != phantom ]; then set -- --data="$$DATA"; else set --; fi; \
	.venv/bin/python benchmarks --device="$$DEVICE" --output="$$RESULTS/benchmarks" $${QUICK:+--quick} $${LONG:+--long} "$$@"

lab: $(STAMP)
	@.venv/bin/python -m jupyterlab --ip=127.0.0.1 $$LAB notebooks/explore.ipynb

strip: $(STAMP)
	@.venv/bin/python -m nbconvert --log-level=WARN --inplace --clear-output --ClearMetadataPreprocessor.enabled=True \
	    --ClearMetadataPreprocessor.preserve_cell_metadata_mask=tags \
	    --ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec notebooks/*.ipynb

# uv resolves for every Python and system at once and keeps the versions that stand in requirements.lock (delete a line
# to get the newest); it asks the index in UV_DEFAULT_INDEX. CUDA builds of PyTorch pin the packages that sed leaves out.
lock:
	@new=$$(mktemp -d) && trap 'rm -rf "$$new"' EXIT && python3.11 -m venv "$$new" && \
	"$$new/bin/python" -m pip install --quiet uv && cp requirements.lock "$$new/all" && \
	"$$new/bin/uv" pip compile --quiet --universal --python-version=3.11 --extra=dev --extra=deploy --generate-hashes \
	    --no-annotate --no-header --output-file="$$new/all" pyproject.toml && \
	head -n 1 requirements.lock > "$$new/lock" && \
	sed -E -e '/^(nvidia|cuda|triton)/,/[^\\]$$/d' -e '$(UNHASHED),/[^\\]$$/{/^ /d;s/ *\\$$//;}' "$$new/all" >> "$$new/lock" && \
	cp "$$new/lock" requirements.lock

clean:
	rm -rf .venv build dist kdlib.egg-info .pytest_cache .hypothesis
	find kdlib tests notebooks -depth \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
