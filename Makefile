# Two commands from a bare machine: `make demo` and `make test`.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Two ranks, unless there is one GPU or one core only (nproc heeds OMP_NUM_THREADS).
RANKS ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU'); \
	[ "$$n" -gt 0 ] || n=$$(env -u OMP_NUM_THREADS nproc); \
	[ "$$n" -ge 2 ] && echo 2 || echo 1)
FREE_PORT = $$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
SEED ?= 0
RUN ?= runs/demo

# Tests that start no processes and train no run: what a change most often breaks, in seconds.
FAST := $(addprefix tests/,test_import_rules.py test_recipe.py test_explain.py test_schedules.py \
	test_counter_rng.py test_small_data.py test_errors.py data/test_plan.py data/test_augment.py \
	data/test_manifest.py data/test_sources.py data/test_archives.py data/test_bad_input.py \
	grouping models/test_heads.py models/test_resnet.py evaluation/test_paper.py \
	evaluation/test_splits.py)

.PHONY: demo test check lint clean check-tools check-test-tools

demo: $(VENV)/.installed
	@echo "== the demo images: 10,000 pictures of ten shapes, as tar shards in demo_data/"
	@$(BIN)/python data_tools/make_demo.py demo_data
	@echo "== training: deepspeed --num_gpus $(RANKS) launcher/pretrain.py recipes/demo.yaml"
	@echo "   (processes on the CPU where there is no GPU)"
	@$(BIN)/deepspeed --num_gpus $(RANKS) --master_port $(FREE_PORT) \
		launcher/pretrain.py recipes/demo.yaml run.seed=$(SEED) run.dir=$(RUN)

test: $(VENV)/.installed-test
	@echo "== the tests; the last lines say what was skipped and why"
	@$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed-test
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	@$(BIN)/pyright & types=$$!; \
	$(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile $(FAST); tests=$$?; \
	wait $$types && exit $$tests

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

clean:
	rm -rf $(VENV) demo_data runs

$(VENV)/.installed: setup.py | $(BIN)/python
	@echo "== installing scale_smog and what it needs into $(VENV): 7 GB, a few minutes"
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: setup.py | $(BIN)/python check-test-tools
	@echo "== installing scale_smog and its test tools into $(VENV): 7 GB, a few minutes"
	@$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(BIN)/python: | check-tools
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# Names what a bare machine lacks, with the line that mends it.
check-tools:
	@[ -n "$(PYTHON)" ] || { echo "error: Python 3.11 or newer is needed:" \
		"apt-get install python3 python3-venv python3-dev, or make PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: this machine lacks python3-venv: apt-get install python3-venv"; exit 2; }

# What torch.compile needs, and git, which names the files of a wheel.
check-test-tools:
	@missing=""; \
	$(PYTHON) -c 'import os, sys, sysconfig as s; \
		sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || missing="$$missing python3-dev"; \
	command -v git >/dev/null || missing="$$missing git"; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	[ -z "$$missing" ] || { echo "error: this machine lacks$$missing: apt-get install$$missing"; exit 2; }
