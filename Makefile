# The commands of the README. Environments are made once and again whenever the requirements change.
PYTHON ?= python3.11
BIN := .venv/bin
CONFIG ?= configs/quickstart.py

.PHONY: run laws test test-fast lint bench clean

run: .venv/run.stamp
	$(BIN)/frugalmoe train --config=$(CONFIG) $(if $(FRESH),--fresh) $(ARGS)

laws: .venv/laws.stamp
	@test -z "$(ROUTER)" || test -f src/frugalmoe/routing/strategies/$(ROUTER).py || \
		{ echo "ROUTER=$(ROUTER): no such file in src/frugalmoe/routing/strategies" >&2; exit 2; }
	$(BIN)/python -m pytest tests/test_routing_laws.py $(if $(ROUTER),-k "test_law[$(ROUTER)-") $(ARGS)

test: .venv/dev.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-fast: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: .venv/run.stamp .venv-bench/stamp
	$(BIN)/python benchmarks/run.py --torch-python .venv-bench/bin/python $(ARGS)

clean:
	rm -rf .venv .venv-bench runs

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

.venv-bench/stamp: requirements-bench.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install -q --disable-pip-version-check -r requirements-bench.txt
	touch $@
