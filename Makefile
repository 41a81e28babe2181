# make demo   practice cases, training, report and segmentations, end to end
# make setup  .venv with pinned dependencies; both other targets call it
# make test   lint, types, import direction and the quick half of the tests
# make test-all   everything

PYTHON ?= python3
# Installed first and never replaced. A CUDA build: make demo TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PINNED := pyproject.toml constraints.txt Makefile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint clean

help:
	@sed -n 's/^# //p' Makefile | head -4

setup: $(VENV)/.ready

# the stamp carries the choice of torch, so that another choice installs anew
TORCH_STAMP := $(VENV)/.torch-$(shell printf %s "$(TORCH)" | cksum | cut -d " " -f 1)

$(TORCH_STAMP): Makefile
	@echo "== $(VENV): $(TORCH)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "medattn needs Python 3.11 or newer, found $$($(PYTHON) --version); try make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@rm -f $(VENV)/.torch-*
	@touch $@

$(VENV)/.ready: $(TORCH_STAMP) $(PINNED)
	@echo "== $(VENV): medattn and its dependencies"
	@$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@echo "== $(VENV): test tools"
	@$(PIP) --constraint constraints.txt --editable ".[test]"
	@# peers of the image networks; their dependencies would replace torch
	@$(PIP) --constraint constraints.txt --no-deps timm torchvision
	@touch $@

DEMO_DATA := data/hn_ct
DEMO_RUN := runs/demo

demo: setup
	@test -f $(DEMO_DATA)/cases.json || $(BIN)/medattn phantom $(DEMO_DATA)
	$(BIN)/medattn train configs/hn_ct.yaml --overwrite data.root=$(DEMO_DATA) run.dir=$(DEMO_RUN) \
		data.spacing_mm='[4, 4, 4]' data.patch_size='[40, 40, 40]' training.max_minutes=4.75 \
		training.learning_rate=3e-3 training.foreground_share=0.9 augment.intensity_probability=0.15

lint: $(VENV)/.ready-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# one worker per core, each computing on one thread: more would wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8

test: lint
	$(PYTEST) -m "not slow and not gpu"

test-all: lint
	$(PYTEST) -m "not gpu"

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
