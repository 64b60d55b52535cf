# Everything a person types: `make help` lists it. The work itself is in localai_q; this makes .venv and calls it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log
MIN := 3.11

.DEFAULT_GOAL := help
.PHONY: help install run wheels test lint proto lock clean

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1 - /'

install: $(VENV)/.installed ## Make .venv and install, for a machine that joins a cluster

run: $(VENV)/.installed ## Make .venv, install, and start a cluster on this machine (Ctrl-C stops it)
	@exec $(BIN)/localai-q up

wheels: $(VENV)/.tests-installed ## Compile what backends need compiled, once for this machine
	@$(BIN)/python -m workers.node.wheels

test: wheels ## Run the tests
	@$(BIN)/pytest -n 3

lint: $(VENV)/.tests-installed ## Check style, types and the direction of imports
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

proto: $(VENV)/.tests-installed ## Generate the gRPC stubs of localai_q/proto anew
	@$(BIN)/python -m localai_q.proto

lock: $(VENV)/.installed ## Pin the newest versions that setup.cfg allows
	@$(COMPILE) -o requirements.txt setup.cfg
	@$(COMPILE) -c requirements.txt --extra test -o requirements-test.txt setup.cfg

clean: ## Remove .venv and what the tools have written
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

COMPILE := $(BIN)/uv pip compile -q --upgrade --universal --python-version $(MIN) --no-header --no-annotate

# One line when something is missing, instead of what the tools say about it.
define fail
{ echo "make: $(1)" >&2; exit 1; }
endef

define install
@echo "Installing into $(VENV) (a minute or two; what happens stands in $(LOG))"
@$(BIN)/python -m pip install --disable-pip-version-check --retries 2 -r $(1) >$(LOG) 2>&1 \
	&& $(BIN)/python -m pip install --disable-pip-version-check --retries 2 --no-deps -e . >>$(LOG) 2>&1 \
	|| $(call fail,the installation failed: $$(grep -m1 ^ERROR $(LOG)) - it needs a network to PyPI$(comma) or PIP_INDEX_URL naming a mirror; see $(LOG))
endef
comma := ,

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || $(call fail,there is no $(PYTHON): install Python $(MIN) or newer$(comma) or name one with 'make run PYTHON=/path/to/python3')
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| $(call fail,$$($(PYTHON) --version) is too old: install Python $(MIN) or newer$(comma) or name one with 'make run PYTHON=/path/to/python3')
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| $(call fail,$(PYTHON) lacks venv or ensurepip: install them$(comma) on Debian and Ubuntu with 'apt install python3-venv')
	@said=$$($(PYTHON) -m venv $(VENV) 2>&1) || $(call fail,cannot make $(VENV) ($$(echo "$$said" | tail -n 1)): use a checkout in a folder that you can write)

$(VENV)/.installed: setup.cfg setup.py requirements.txt | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	$(call install,requirements.txt)
	@touch $@

$(VENV)/.tests-installed: requirements-test.txt $(VENV)/.installed
	$(call install,requirements-test.txt)
	@touch $@
