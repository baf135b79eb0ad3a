# One verb a target; `make install` first, everything else calls it by itself.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := install
.DELETE_ON_ERROR:

# The first interpreter that is new enough; `make PYTHON=python3.13 install` picks another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PYTEST ?= $(BIN)/pytest
PYTEST_ARGS ?=
CHECKS ?= lint
PEERS_RESULT ?= bench/results/peers.json
BENCH_RESULT ?= bench/results/tqe.json

# The strict editable install links each file, so the list of files is part of what was installed.
TREE := $(shell find engine ml lua -type f '(' -name '*.py' -o -name '*.pyi' -o -name '*.lua' -o -name py.typed \
	-o -path '*/assets/*' ')' | sort)
CYTHON := $(wildcard engine/*.pyx engine/*.pxi engine/*.pxd)

.PHONY: install demo test bench bench-compare bench-counts bench-peers bench-http bench-ordering bench-ordering-engine peers-table marks-table ordering-tables screenshots hostile lint stub campaign image-check clean FORCE

install: $(VENV)/.built

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "TQE needs Python 3.11 or newer on PATH (or make PYTHON=/path/to/python)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "this Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.deps: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q --disable-pip-version-check --group dev
	@touch $@

$(VENV)/.tree: FORCE | $(VENV)/bin/python
	@printf '%s\n' $(TREE) | cmp -s - $@ || printf '%s\n' $(TREE) > $@

$(VENV)/.built: $(VENV)/.deps $(VENV)/.tree setup.py $(CYTHON)
	@echo 'building and installing tqe'
	@PYTHONWARNINGS=ignore flock $(VENV)/.lock $(BIN)/python -m pip install -q --disable-pip-version-check \
		--no-build-isolation --config-settings editable_mode=strict -e .
	@touch $@

demo: install
	$(BIN)/tqe demo
	@echo 'For these commands, first: . $(BIN)/activate'

# BENCH_ARGS="drain singles --runs 7 --json FILE"
bench: install
	$(BIN)/tqe bench $(BENCH_ARGS)

# REV=HEAD~1, or REV=v1 AGAINST=v2
bench-compare: install
	@[ -n "$(REV)" ] || { echo "make bench-compare REV=COMMIT: the commit to compare the working tree with" >&2; exit 2; }
	$(BIN)/python -m bench.compare $(REV) $(if $(AGAINST),--against $(AGAINST))

# UPDATE=1 makes what was counted the committed figures
bench-counts: install
	$(BIN)/python -m bench.counts $(if $(UPDATE),--update) $(COUNTS_ARGS)

# PEERS="tqe celery", PEERS_ARGS="--scale 0.1 --rounds 1 --out FILE"
bench-peers: install
	$(BIN)/python -m bench.peers.run $(PEERS) --out $(PEERS_RESULT) $(PEERS_ARGS)
	$(BIN)/python -m bench.peers.table $(PEERS_RESULT)

# HTTP_ARGS="--scale 0.3 --out FILE"
bench-http: install
	$(BIN)/python -m bench.rest.run --write docs/HTTP_API.md $(HTTP_ARGS)

peers-table: install
	$(BIN)/python -m bench.peers.table $(PEERS_RESULT) --write README.md

# the table of docs/PERFORMANCE.md, from `tqe bench all --json bench/results/tqe.json`
marks-table: install
	$(BIN)/python -m bench.marks $(BENCH_RESULT) --write docs/PERFORMANCE.md

# TRACES=FOLDER of *.csv.gz and schema.json; without it, made traces
bench-ordering: install
	$(BIN)/python -m bench.ordering.run $(if $(TRACES),--traces $(TRACES))
	$(BIN)/python -m bench.ordering.replay $(if $(TRACES),--traces $(TRACES)) $(if $(TRACE),--trace $(TRACE))

# what ordering costs in running workers, with marks; ENGINE_ARGS="--scale 0.1 --out FILE"
bench-ordering-engine: install
	$(BIN)/python -m bench.ordering.engine $(ENGINE_ARGS)

# the tables of docs/ORDERING.md and of the top README, from the committed results about ordering
ordering-tables: install
	$(BIN)/python -m bench.ordering.tables

# HOSTILE_ARGS="--requests 20000 --seed 2"
hostile: install
	$(BIN)/python -m tests.support.hostile $(HOSTILE_ARGS)

# the pictures of docs/DASHBOARD.md; needs Chromium, takes two minutes
screenshots: install
	$(BIN)/python docs/screenshots.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy --strict -p tqe

# Several pytests at once, and CHECKS beside them; with PYTEST_ARGS="-k settings" one pytest, after lint
test: install
ifeq ($(PYTEST_ARGS),)
	$(BIN)/python -m tests.support.lanes $(foreach check,$(CHECKS),--beside "$(MAKE) --no-print-directory $(check)") $(LANES_ARGS)
else
	@$(MAKE) --no-print-directory lint
	$(PYTEST) -m "not campaign" $(PYTEST_ARGS)
endif

campaign: install
	$(PYTEST) -m campaign $(PYTEST_ARGS)

stub: install
	$(BIN)/python -m mypy.stubtest tqe._fast --allowlist tests/stubtest_allow.txt --ignore-unused-allowlist

# The steps of deploy/Dockerfile and its command, without a container engine; as root, a minute or two
image-check: install
	$(BIN)/python -m tests.deploy.image

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis $(VENV)/.built $(VENV)/.deps $(VENV)/.tree
