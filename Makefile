# make train: set up .venv and train on real images.   make test: set up .venv, lint, run the tests.
# make docs: set up .venv and build the pages, docs/_build/html/index.html.
# Another workdir or other settings: make train WORKDIR=runs/mine ARGS="--config.epochs=10".
# The newest Python that runs here; each has its pinned versions in constraints.txt. Another one: make PYTHON=python3.11.
FITS := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11 python3,$(shell $(name) -c '$(FITS)' 2>/dev/null && echo $(name))) python3)
WORKDIR ?= runs/digits_convshort
ARGS ?=
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: train test docs results clean

train: .venv/installed
	$(BIN)/python -m nfjax.main --config=configs/digits_convshort.py --workdir=$(WORKDIR) $(ARGS)

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --dist worksteal

docs: .venv/docs-installed
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# What the README shows of tables, signal propagation and a first run, measured again; benchmarks/ has the rest.
results: .venv/installed
	mkdir -p results/digits_convshort
	$(BIN)/python -m nfjax.main --config=configs/digits_convshort.py --workdir=runs/results | tail -n 6 > results/digits_convshort/output.txt
	cp $(addprefix runs/results/,curves.png metrics.jsonl versions.json config.json) results/digits_convshort
	$(BIN)/python -m nfjax.reproduce table1 table2 figure2 figure6 claims --out=results
	$(BIN)/python -m benchmarks tables

clean:
	rm -rf .venv build docs/_build *.egg-info

# Installed once, from the pinned versions, and again only when one of these two files changes.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("nfjax needs Python 3.11 or newer, found %d.%d: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Only those who build the pages need what they are built with.
.venv/docs-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@
