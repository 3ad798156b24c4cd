# Edgewater for developers. A device installs with deploy/INSTALL.md.
VENV := .venv
BIN := $(VENV)/bin
# Arguments for the verb, as in `make demo ARGS=--all` or `make test ARGS="-k ring"`.
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test torture lint format bench clean

help:  ## list these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

# The stamp is newer than everything that decides what is installed, so a second call installs nothing.
$(VENV)/.installed: pyproject.toml deploy/constraints.txt deploy/install.sh
	deploy/install.sh --editable --extras train,opcua,modbus,dev $(VENV)
	@touch $@

install: $(VENV)/.installed  ## make .venv with everything (PYTHON=..., CUDA=1, TORCH_INDEX=..., WHEELS=... to choose)

demo: install  ## learn from the streams that ship with the project, and print what was learned
	$(BIN)/edgewater demo $(ARGS)

test: install  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

torture: install  ## the whole crash suite: 20,000 power cuts, 5,000 kills and more (ARGS=--help; ARGS="--states 500 --only ring")
	$(BIN)/python -m tests.crash.torture $(ARGS)

lint: install  ## ruff and mypy, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## run the benchmarks (minutes)
	@set -e; for bench in $(sort $(filter-out tests/bench/_%,$(wildcard tests/bench/*.py))); do echo "== $$bench"; $(BIN)/python "$$bench" $(ARGS); done

clean:  ## remove .venv and what tools left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis test-results
	find pipeline adapters storage tests -name __pycache__ -type d -prune -exec rm -rf {} +
