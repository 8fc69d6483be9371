PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
QUICKSTART := recipes/quickstart.yaml
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

.PHONY: install quickstart test test-slow test-plugins check coverage mutants bench docs clean help

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

install: $(STAMP)  ## make .venv and install tdro with pinned dependencies

# the dependencies are pinned first and without a build of ours, so that torch stays the build that constraints.txt names
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep -E '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install  ## the main job on the embedded sample data: 10 minutes on 2 cores
	$(BIN)/tdro sample sample
	$(BIN)/tdro run $(QUICKSTART)

# tiny models are fastest on one thread, and threads that share cores with other work only wait for each other
test: install  ## the default tests: under 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-slow: install  ## the long tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-plugins: install  ## install the distributions under plugins/ and run their tests
	for plugin in plugins/*/; do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$plugin && \
		$(BIN)/python -m pytest $$plugin/tests || exit 1; \
	done

check: install  ## lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: install  ## the share of lines that the default tests run, with the processes that they start
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --sort=cover

# one process a mutant, forked from one that has imported torch and collected the tests
mutants: install  ## change the modules of the method in every small way and see that their tests notice: 20 minutes of CPU
	rm -rf mutants
	OMP_NUM_THREADS=1 $(BIN)/mutmut run
	$(BIN)/mutmut results

bench: install  ## side-by-side speed measurements, each printing a ratio
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

docs: install  ## regenerate what is generated under docs/
	$(BIN)/python -m tdro_cli.report.reference recipe > docs/recipe.md
	$(BIN)/python -m tdro_cli.report.reference commands > docs/commands.md
	$(BIN)/python -m tdro_cli.report.figures > docs/method.svg

clean:  ## remove what the other targets made, except .venv
	rm -rf runs sample build dist .pytest_cache .ruff_cache .mypy_cache mutants .hypothesis .coverage*
