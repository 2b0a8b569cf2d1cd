# Two commands do everything on a fresh machine: `make demo` and `make test`.
#
#   make demo     install, run the main job on the demo model with real vLLM on the CPU, say where the report is
#   make test     install, run every test (real-engine tests included)
#   make check    what every commit passes: format, lint, types (make static alone), audit, tests without an engine
#   make audit    dependencies: known vulnerabilities, versions that fit, licences
#   make lint     format and lint, mending what can be mended
#   make bench    the project's own benchmarks
#   make kernels  the CUDA kernels for every card that nvcc knows (needs a CUDA toolkit; a sweep with @kneebench does it too)
#
# pip's own configuration decides where packages come from. Where its index lacks the CPU build of torch, say where it
# is:  make demo INDEX="--extra-index-url URL"

PYTHON ?= python3
INDEX ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test static check audit lint bench kernels venv engine clean

demo: engine
	$(BIN)/bench sweep

# Files of tests are shared out to all cores, but for the real engine: a server wants the machine for itself.
SHARED := -n auto --dist loadfile -m "not engine"

test: engine
	$(BIN)/python -m pytest $(SHARED)
	$(BIN)/python -m pytest -m engine

static: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# What kneebench is built on: known vulnerabilities, licences (SECURITY.md).
audit: venv
	$(BIN)/python tools/audit.py

check: static audit
	$(BIN)/python -m pytest $(SHARED)

lint: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: venv
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/clock.py

kernels: venv
	$(BIN)/python -m quantize.kernels.build

venv: $(BIN)/.ready

$(BIN)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(INDEX) -e '.[quantize,tasks,cluster,dev]'
	touch $@

engine: venv
	$(BIN)/bench engine install cpu $(INDEX)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
