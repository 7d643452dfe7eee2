# The two commands for a new machine are `make demo` and `make test`; all they need is Python and make.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
FUZZ_S ?= 60
FUZZ = -max_total_time=$(FUZZ_S) -timeout=20 -rss_limit_mb=2048 -max_len=4096 -artifact_prefix=.fuzz/
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL = help
.PHONY: help demo test bench soak fuzz check format screenshots clean

help: ## show this
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/demo ## five simulated vendors, the daemon, Redis and MQTT, until Ctrl-C
	@exec $(BIN)/poller demo $(DEMO)

test: $(VENV)/test ## every test, with coverage gates
	PATH="$(abspath $(BIN)):$$PATH" scripts/test

soak: $(VENV)/test ## everything goes wrong for ten minutes, and nothing may be lost
	$(BIN)/python -m tests.soak $(SOAK)

fuzz: $(VENV)/fuzz ## hostile answers and settings, led by coverage, FUZZ_S seconds (60) for each
	@mkdir -p .fuzz/parse .fuzz/settings
	$(BIN)/python -m tests.fuzz.parse .fuzz/parse $(FUZZ)
	$(BIN)/python -m tests.fuzz.settings .fuzz/settings $(FUZZ)
bench: $(VENV)/demo ## performance against the floors, at most ten minutes; writes docs/performance.md
	$(BIN)/python -m bench $(BENCH)

check: $(VENV)/check ## format, lint, types, layers, dependencies
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

format: $(VENV)/check ## format and mend what can be mended
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

screenshots: $(VENV)/test ## pictures of the board into docs/, of a living demo; wants chromium
	$(BIN)/python scripts/screenshots.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .coverage* .fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/pip:
	@echo "setting up $(VENV) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "poller needs Python 3.11 or later: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade "pip>=25.1"
	@touch $@

$(VENV)/demo: pyproject.toml constraints.txt | $(VENV)/pip
	@echo "installing poller and its demo brokers ..."
	@$(PIP) --editable ".[demo,speed]"
	@touch $@

$(VENV)/test: pyproject.toml constraints.txt | $(VENV)/demo
	@echo "installing what the tests need ..."
	@$(PIP) --group test
	@touch $@

$(VENV)/fuzz: pyproject.toml constraints.txt | $(VENV)/test
	@echo "installing the fuzzer ..."
	@$(PIP) --group fuzz
	@touch $@

$(VENV)/check: pyproject.toml constraints.txt | $(VENV)/test
	@echo "installing the checkers ..."
	@$(PIP) --group check
	@touch $@
