# The commands of the README. Environments are made once and again whenever the requirements change.
PYTHON ?= python3.11
BIN := .venv/bin
CONFIG ?= configs/quickstart.py

# Of an interpreter that runs: pyenv puts names of those that are not selected on the path too.
NEWEST_PYTHON = $(shell for python in python3.12 python3.13 $(HOME)/.pyenv/versions/3.1[23].*/bin/python; do \
	"$$python" -c "import ensurepip" 2>/dev/null && echo "$$python" && break; done)
# The newest stack has no PyTorch: parity with `transformers` is a matter of the pinned one.
TORCHLESS = $(patsubst %,--ignore %,$(shell grep -lE "^(import|from) (torch|transformers|published|parity)" tests/test_*.py))
NO_NEWEST_PYTHON = test-newest: no Python 3.12 or 3.13 runs on this machine, so nothing was tested on the newest JAX

.PHONY: run laws test test-fast test-newest run-newest lint fuzz parity paper faults bench clean

run: .venv/run.stamp
	$(BIN)/frugalmoe train --config=$(CONFIG) $(if $(FRESH),--fresh) $(ARGS)

laws: .venv/$(if $(ROUTER),run,laws).stamp
	$(BIN)/$(if $(ROUTER),frugalmoe laws $(ROUTER),python -m pytest tests/test_routing_laws.py) $(ARGS)

test: .venv/dev.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-fast: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not (slow or whole)" $(ARGS)

test-newest:
	@$(if $(NEWEST_PYTHON),$(MAKE) --no-print-directory run-newest PYTHON=$(NEWEST_PYTHON),echo "$(NO_NEWEST_PYTHON)")

run-newest: .venv-newest/stamp
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile -m "newest or not slow" \
		$(TORCHLESS) $(ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/frugalmoe routers --format=markdown > docs/routers.md

fuzz: .venv/dev.stamp
	$(BIN)/python tests/faults/fuzz.py $(ARGS)

parity: .venv/dev.stamp
	$(BIN)/python tests/parity.py

paper: .venv/dev.stamp
	$(BIN)/python tests/islands_paper.py
	$(BIN)/python tests/published_runs.py

faults: .venv/dev.stamp
	$(BIN)/python tests/faults/matrix.py $(ARGS)

bench: .venv/run.stamp .venv-bench/stamp
	$(BIN)/python benchmarks/run.py --torch-python .venv-bench/bin/python $(ARGS)

clean:
	rm -rf .venv .venv-newest .venv-bench runs

.venv/run.stamp: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

.venv/laws.stamp: .venv/run.stamp requirements-laws.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-laws.txt
	touch $@

.venv/dev.stamp: .venv/laws.stamp requirements-dev.txt requirements-aot.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target .venv/aot \
		-r requirements-aot.txt
	touch $@

.venv-newest/stamp: requirements-newest.txt requirements-aot.txt pyproject.toml
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check -r requirements-newest.txt
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check --no-deps --upgrade \
		--target .venv-newest/aot -r requirements-aot.txt
	touch $@

.venv-bench/stamp: requirements-bench.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install -q --disable-pip-version-check -r requirements-bench.txt
	touch $@
