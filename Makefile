# `make` prints this list. Every target does the set-up it needs; nothing is installed by hand.

PYTHON ?=
ORACLE_PYTHON ?=
ORACLE_TORCH ?= torch==2.13.0
ORACLE_PACKAGES ?= transformers==5.23.0 llama-models==0.3.0
ARGS ?=

BIN := .venv/bin
PY := $(BIN)/python
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PYENV_VERSIONS := $${PYENV_ROOT:-$$HOME/.pyenv}/versions

# $(call find_python,CANDIDATES,TEST): the first candidate that runs, can make an environment and
# passes the test on sys.version_info. An old launcher on PATH fails the test and is passed over.
find_python = for p in $(1); do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(not ($(2)))' >/dev/null 2>&1 && { echo "$$p"; break; }; \
	done

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint types format nano parity bench-hf bench-serve browser compile kernels hooks \
	clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

demo: .venv/.installed  ## the whole system on the shipped nano model, in about two minutes
	$(PY) -m experiments.demo

test: lint types  ## style, types, import direction and every test but the slow ones, on CPU
	$(PY) -m pytest $(ARGS)

slow: .venv/.installed  ## the tests marked slow
	$(PY) -m pytest -m slow $(ARGS)

lint: .venv/.installed  ## ruff and the import direction
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-logo

types: .venv/.installed  ## the type checker
	$(BIN)/pyrefly check

format: .venv/.installed  ## let ruff lay out the files and repair what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

nano: .venv/.installed  ## train the shipped model again, into runs/nano
	$(PY) -m experiments.pretrain --recipe=nano --workdir=runs/nano $(ARGS)

parity: .venv/.installed .oracle/.installed  ## compare live with HF transformers; print the errors
	$(PY) tests/parity/compare.py $(ARGS)

bench-hf: .venv/.installed .oracle/.installed  ## time beside HF transformers on this CPU
	$(PY) tests/parity/bench.py $(ARGS)

bench-serve: .venv/.installed .oracle/.installed  ## time the engine and the server on this CPU
	$(PY) tests/parity/bench_serve.py $(ARGS)

browser: .venv/.installed  ## send text and a picture by the chat page in a headless Chromium
	@command -v chromium >/dev/null || { apt-get update -q && apt-get install -y -q chromium; }
	@$(PY) -c 'import playwright' 2>/dev/null || $(PY) $(PIP_INSTALL) --editable '.[browser]'
	$(PY) -m tests.browser.chat_page

compile: .compile/.installed  ## compile Scout for TPU v5p and 8 H100s with neither at hand
	.compile/bin/python -m experiments.compile_targets $(ARGS)

kernels: .compile/.installed  ## compile every kernel for TPUs and a GPU with none at hand
	.compile/bin/python -m experiments.benchmark --suite=compile $(ARGS)

hooks: .venv/.installed  ## run the fast checks before every commit
	$(BIN)/pre-commit install

clean:  ## remove the environments and what tools leave
	rm -rf .venv .oracle .compile build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is touched last, so an installation that was cut short is done again.
.venv/.installed: pyproject.toml requirements.txt
	@if ! $(PY) -c '' 2>/dev/null; then \
		python=$$($(call find_python,$(PYTHON) python3.12 python3.13 python3 python python3.14 \
			$(PYENV_VERSIONS)/3.1[2-9]*/bin/python,sys.version_info >= (3, 12))); \
		if [ -z "$$python" ]; then \
			echo "llama4_jax needs Python 3.12 or newer with its venv module, and none was found:" \
				"install one, or name it with make PYTHON=/path/to/python3.12." >&2; exit 1; \
		fi; \
		echo "making .venv with $$python (once)"; \
		rm -rf .venv && "$$python" -m venv .venv; \
	fi
	@echo "installing llama4_jax and its packages into .venv (some minutes the first time)"
	@$(PY) $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

# The reference implementations need torch, which the project itself does not.
.oracle/.installed: Makefile
	@python=$$($(call find_python,$(ORACLE_PYTHON) python3.11 python3.12 python3 \
		$(PYENV_VERSIONS)/3.11*/bin/python,(3, 10) <= sys.version_info < (3, 14))); \
	if [ -z "$$python" ]; then \
		echo "the reference implementations need Python 3.10 to 3.13 with its venv module, and none" \
			"was found: install one, or name it with make parity ORACLE_PYTHON=/path/to/python3.11." >&2; \
		exit 1; \
	fi; \
	echo "making .oracle with $$python (once)"; \
	rm -rf .oracle && "$$python" -m venv .oracle
	@.oracle/bin/python $(PIP_INSTALL) $(ORACLE_TORCH)
	@.oracle/bin/python $(PIP_INSTALL) $(ORACLE_PACKAGES)
	@touch $@

# The compilers of TPUs and GPUs stay out of .venv, where jax would look for their devices.
.compile/.installed: .venv/.installed
	@echo "making .compile: the TPU and CUDA compilers (once, several gigabytes)"
	@rm -rf .compile && $(PY) -m venv .compile
	@.compile/bin/python $(PIP_INSTALL) --editable . libtpu 'jax[cuda13]'
	@touch $@
