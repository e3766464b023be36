# Two commands on a fresh machine: `make demo` and `make test`. Both install what they need and can be run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
STARTED := $(VENV)/.installing
DOCS_INSTALLED := $(VENV)/.docs-installed
PLAY := $(VENV)/play
LIGHT := typer rich
RUN := runs/demo
# TESTS narrows `make test` down, as in: make test TESTS=tests/diffusion/test_path.py
TESTS ?= tests
# Of `make gpu`. DATA: CIFAR-10 as under `data` of a config; WEIGHTS: resnet20.th.
MINUTES ?= 12
DEVICE ?= cuda
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.PHONY: help install browser play demo test test-full equality gpu leaderboard format schema docs wheel image clean

help:  ## Say what there is to do.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(INSTALLED)  ## Create .venv with the tested set of packages. PYTHON=python3.12 names another Python.

# An install that was broken off leaves $(STARTED), and begins anew: nothing says which packages are whole.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON): no Python of at least 3.11; name one: make install PYTHON=python3.12" >&2; exit 1; }
	@test ! -e $(STARTED) || { echo "The last install did not end: $(VENV) is made anew; pip keeps its downloads."; rm -rf $(VENV); }
	@echo "Installing into $(VENV): about 5 GB, a few minutes the first time."
	@mkdir -p $(VENV) && touch $(STARTED)
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot make a virtual environment: apt-get install python3-venv, or make install PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@rm $(STARTED) && touch $@
	@echo "Installed. In this shell, before diffdistill is found: source $(BIN)/activate"

browser:  ## Debian's Chromium, which the tests of the HTML pages drive; without it they are skipped. Needs root.
	@{ command -v chromium && command -v chromedriver; } > /dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium chromium-driver; } > /dev/null

# gradio 6 needs a pillow before 13, which the tested set holds: it stands in an environment of its own over the first.
$(PLAY)/.installed: $(INSTALLED) constraints-play.txt
	@$(BIN)/python -m venv $(PLAY)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(PLAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/over.pth
	@grep -v '^pillow==' constraints.txt > $(PLAY)/constraints.txt
	@$(PLAY)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(PLAY)/constraints.txt --constraint constraints-play.txt 'gradio>=6'
	@touch $@

play: $(PLAY)/.installed  ## gradio in .venv/play, for `.venv/play/bin/python -m diffdistill play RUN` and its tests.

demo: $(INSTALLED)  ## Train a digits teacher, distil it to one step, print the table, write the pictures.
	@$(BIN)/diffdistill demo --run $(RUN)

test: $(INSTALLED)  ## ruff, mypy, import-linter and the tests that CI runs.
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/pytest -rs $(PARALLEL) -m "not full and not gpu" $(TESTS)

test-full: $(INSTALLED)  ## Everything, seeds and planted faults included; takes long. Writes docs/test-full.txt.
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@{ date -u '+%Y-%m-%d, make test-full TESTS="$(TESTS)":'; $(BIN)/python scripts/describe_machine.py; } > docs/test-full.txt
	@test "$(TESTS)" != tests || $(MAKE) --no-print-directory equality >> docs/test-full.txt
	@$(BIN)/pytest $(PARALLEL) -m "not gpu" --durations=10 $(TESTS) > docs/test-full.out; status=$$?; \
		tail -n 14 docs/test-full.out | tee -a docs/test-full.txt; rm docs/test-full.out; exit $$status

equality: $(INSTALLED)  ## Every method on 1, 2 and 4 processes, replicated and sharded; the table goes into docs/scaling.md.
	@$(BIN)/python -W ignore tests/equal.py

gpu: $(INSTALLED)  ## All that wants a GPU, within MINUTES: kernels, tests, times, memory, CIFAR-10; writes docs/gpu.md.
	@$(BIN)/python scripts/gpu.py --minutes $(MINUTES) --device $(DEVICE) $(if $(DATA),--data '$(DATA)') $(if $(WEIGHTS),--weights $(WEIGHTS))

leaderboard: $(INSTALLED)  ## Every method from one digits teacher, three seeds, into docs/digits-board.md; hours of CPU, kept as it goes.
	@$(BIN)/python scripts/leaderboard.py train
	@$(BIN)/python scripts/leaderboard.py train --mlp
	@$(BIN)/python scripts/leaderboard.py table

format: $(INSTALLED)  ## Let ruff rewrite what it can.
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

schema: $(INSTALLED)  ## Write configs/schema.json, which editors complete configs by, and the docs' tables anew.
	@$(BIN)/python -c 'from diffdistill.training.config import json_schema; print(json_schema(), end="")' > configs/schema.json
	@$(BIN)/python docs/settings.py
	@$(BIN)/python docs/notebook.py

$(DOCS_INSTALLED): $(INSTALLED)
	@$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: $(DOCS_INSTALLED)  ## Build the documentation into site/.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html is written."

# Of its dependencies the empty environment gets what --help needs; the rest would be gigabytes. -I: not those of this folder.
wheel: $(INSTALLED)  ## Build dist/, check it with twine, and try the wheel in an empty environment.
	@rm -rf dist build && $(BIN)/python -m build --outdir dist . > /dev/null
	@$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/python -m venv build/venv
	@build/venv/bin/python -I -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(LIGHT)
	@build/venv/bin/python -I -m pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
	@cd build && venv/bin/python -I venv/bin/diffdistill --version && venv/bin/python -I venv/bin/diffdistill --help > /dev/null
	@rm -rf build

image:  ## A container image, diffdistill; BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 for a GPU. Needs docker.
	docker build --tag diffdistill $(if $(BASE),--build-arg BASE=$(BASE)) .

clean:  ## Remove the virtual environment and the caches; runs stay.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist site *.egg-info
