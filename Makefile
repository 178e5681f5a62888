# make env | demo | test | lint | bench | lock      (needs only Python >= 3.11, pip and make)
PYTHON ?= python3
UV := .uv/bin/uv
BIN := .venv/bin
STAMP := .venv/.synced

# A new interpreter takes half the time where what it imports was compiled before.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env demo test lint bench lock clean
env: $(STAMP)

$(UV): requirements-uv.lock
	$(PYTHON) -m pip install --quiet --upgrade --require-hashes --target .uv -r requirements-uv.lock
	@touch $@

$(STAMP): $(UV) requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) .venv
	$(UV) pip sync --quiet --require-hashes --python $(BIN)/python requirements.lock
	$(UV) pip install --quiet --no-deps --no-build-isolation --python $(BIN)/python --editable .
	@touch $@

demo: env
	$(BIN)/osteogate demo

# A test at a time for each core, at most four (tests/conftest.py); the tests of a file stay together.
test: env
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: env
	$(BIN)/python -m tests.bench

# Locks name packages, versions and hashes, never an index.
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --no-emit-find-links --no-annotate
lock: $(UV)
	$(COMPILE) --extra worker --extra dev pyproject.toml -o requirements.lock
	$(COMPILE) --constraint requirements.lock pyproject.toml -o requirements-service.lock
	$(COMPILE) --constraint requirements.lock --extra worker pyproject.toml -o requirements-worker.lock

clean:
	rm -rf .venv .uv
