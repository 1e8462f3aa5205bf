# Two commands on a fresh machine:   make book   make test
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXECUTE := env -u UDM_TEXT $(BIN)/python tools/execute.py
UDM_MINUTES ?= 30
UDM_MIN_COUNT ?= 3
export PYTHONPATH :=
, := ,

# What the environment is made from: the pins and the dependency part of pyproject.toml. Not the file's date: every
# nbdev_export rewrites pyproject.toml.
DIGEST = { cat constraints.txt; sed -n '/^\[build-system\]/,/^$$/p; /^dependencies/,/^\[tool.pytest/p' pyproject.toml; } \
         | sha256sum | cut -c1-16

.PHONY: help setup peers rival book export run render test test-all bench quality text lab check clean

help:  ## this list
	@echo "Usage: make TARGET"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14
	@echo "On a fresh clone, book and test set everything up by themselves (Python 3.11 or newer)."

setup:  ## the environment in .venv (once; again when the pins change)
	@digest=$$($(DIGEST)); [ -e $(VENV)/ready-$$digest ] && exit 0
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x ...")'
	echo "== set-up 1/3: virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	echo "== set-up 2/3: torch. About 0.2 GB to download for the processor build, 3 GB with CUDA (the default on Linux)."
	echo "   Without a GPU, TORCH_CPU='--index-url ADDRESS' with the address of PyTorch's own CPU index saves that."
	if command -v nvidia-smi >/dev/null; then where=""; else where="$${TORCH_CPU:-}"; fi
	$(PIP) install torch -c constraints.txt $$where
	echo "== set-up 3/3: the library, Jupyter, nbdev, pandoc, pytest (about 130 packages, 0.3 GB)"
	$(PIP) install -e '.[dev]' -c constraints.txt
	rm -f $(VENV)/ready-*
	touch $(VENV)/ready-$$digest
	echo "== set-up done"

# Another library beside ours, from an extra of pyproject.toml: name of the extra, what for.
define WITH
digest=$$($(DIGEST)); [ -e $(VENV)/$(1)-$$digest ] && exit 0
echo "== set-up for $(2)"
$(PIP) install -e '.[dev,$(1)]' -c constraints.txt
rm -f $(VENV)/$(1)-*
touch $(VENV)/$(1)-$$digest
endef

peers: setup
	@$(call WITH,peers,test-all: the other library that samplers are compared with (11 packages$(,) 15 MB))

rival: setup
	@$(call WITH,quality,quality: the other library that is trained on the same digits (6 packages$(,) 15 MB))

export: setup
	@$(BIN)/nbdev_export

run: export
	@$(EXECUTE)

render:
	@if command -v quarto >/dev/null; then
	  quarto render --quiet
	  echo "rendered by Quarto $$(quarto --version)"
	  echo "(its search needs a server: $(BIN)/python -m http.server -d _docs)"
	else
	  $(BIN)/python tools/render.py
	fi

book: run render  ## export the library, run stale notebooks, render the book into _docs
	@echo "Read it: file://$(CURDIR)/_docs/index.html"

# Everything runs even when an earlier part failed, so that one call shows all that is wrong.
define TEST
failed=""
echo "== the library against its notebooks"
$(BIN)/python tools/export_check.py || failed="$$failed export"
echo "== stored outputs"
$(EXECUTE) --check || failed="$$failed outputs"
echo "== statements, laws and examples of the notebooks"
$(EXECUTE) --test $(1) || failed="$$failed notebooks"
echo "== pytest (a dot is a passed test, F a failed one, s a skipped one; the last line counts them)"
[ -z "$$failed" ] || echo "   already FAILED above:$$failed"
$(BIN)/python -m pytest -q $(2) || failed="$$failed pytest"
[ -z "$$failed" ] || { echo "make test FAILED:$$failed (see above)"; exit 1; }
endef

test: setup  ## all checks of the notebooks and pytest, without what is marked slow
	@$(call TEST,,)

test-all: peers  ## the same with slow cells and slow tests, and beside another library (diffusers)
	@$(call TEST,--slow,-m "slow or not slow")

bench: setup  ## the library beside its peers: one table of ratios
	@$(BIN)/python benchmarks/run.py

quality: rival  ## digits after 2 and 5 minutes of training, beside another library, three seeds; stores the report
	@$(BIN)/python benchmarks/quality.py

text:  ## train on your own lines: UDM_TEXT=file UDM_MINUTES=30 UDM_ROW=characters-in-a-row
	@if [ -z "$${UDM_TEXT:-}" ]; then
	  echo "make text UDM_TEXT=FILE trains a mask and an edit model on the lines of FILE (UTF-8, all of one length),"
	  echo "prints bits per character on held-out lines and new texts, and stores a report for the chapter on text."
	  echo "  UDM_MINUTES=30     minutes of training; measuring takes some more"
	  echo "  UDM_ROW=5          characters in a row of the shown texts (default: all in one)"
	  echo "  UDM_MIN_COUNT=3    rarer characters are unknown ones"
	  exit 2
	fi
	$(MAKE) setup
	$(BIN)/python tools/text.py "$$UDM_TEXT" --minutes $(UDM_MINUTES) --min-count $(UDM_MIN_COUNT) $${UDM_ROW:+--row $$UDM_ROW}

lab: setup  ## the notebooks in Jupyter Lab
	@$(BIN)/jupyter lab nbs

check: setup  ## nothing generated is stale: export from nothing, clean, compare with git
	@echo "== exporting the library from nothing, cleaning the notebooks"
	rm -f udm_book/*.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	changes=$$(git status --porcelain)
	if [ -n "$$changes" ]; then
	  echo "make check FAILED: these files differ from what is committed"
	  echo "$$changes"
	  git --no-pager diff --stat
	  exit 1
	fi
	echo "nothing changed, nothing untracked"

clean:  ## remove the environment, the rendered book and caches
	rm -rf $(VENV) _docs _proc build dist *.egg-info .pytest_cache .hypothesis nbs/.hypothesis nbs/.last_checked
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.ONESHELL:
