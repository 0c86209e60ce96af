# Every target makes its own virtual environment first: a machine with Python >= 3.11, pip and make is enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Extra words for pip, for example PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" (see README).
PIP_ARGS ?=
GPU_JSON ?= bench/results/gpu.json

.PHONY: install demo test soak test-peers test-oldest check bench bench-gpu gpu-wheels clean help

help:            ## what can be made
	@grep -E '^[a-z-]+: .*##|^[a-z-]+: +##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(VENV)/.installed  ## the virtual environment, with everything the other targets need

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: install    ## the whole story on the built-in corpus, on a CPU, in minutes
	$(BIN)/oriole demo

test: install    ## the test suite (under ten minutes on two cores)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

soak: install    ## the long forms of the tests (under an hour on two cores)
	$(BIN)/python -m pytest -m soak --timeout 3000

test-peers: $(VENV)-peers/.installed  ## the same numbers as other libraries, in an environment of its own
	$(VENV)-peers/bin/python -m pytest tests/peers -o filterwarnings=default

$(VENV)-peers/.installed: pyproject.toml tests/peers/requirements.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[hf]' pytest \
	  pytest-timeout hypothesis -r tests/peers/requirements.txt
	@touch $@

test-oldest: $(VENV)-oldest/.installed  ## the test suite with the oldest PyTorch that is supported
	$(VENV)-oldest/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

$(VENV)-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[dev]' torch==2.11.0
	@touch $@

check: install   ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install   ## the benchmarks; appends JSON to bench/results/
	$(BIN)/python -m bench.train
	$(BIN)/python -m bench.decode

gpu-wheels:      ## fetch what a machine that has only PyTorch lacks for bench-gpu into .wheels
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --dest .wheels --only-binary=:all: \
	  --python-version 3.12 --platform manylinux2014_x86_64 pydantic typing-inspection xxhash

bench-gpu:       ## the GPU set, with the machine's own PyTorch; two commands of under eight minutes, one JSON
	$(PYTHON) -m bench.gpu part=1 json=$(GPU_JSON)
	$(PYTHON) -m bench.gpu part=2 json=$(GPU_JSON)

clean:           ## remove the virtual environment and caches (never runs/)
	rm -rf $(VENV) $(VENV)-peers $(VENV)-oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
