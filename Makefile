# `make run` starts Relay with demo flags, `make test` checks everything. Both make their own
# environment in .venv; all they need is Python 3.11 or newer. Another one may be named, and has an
# environment of its own beside the usual one: make PYTHON=python3.13 uses .venv-3.13.

PYTHON ?= python3
PORT ?= 8030
ifeq ($(origin PYTHON),file)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
BIN := $(VENV)/bin
IMAGE_PYTHON := $(shell sed -n 's/^ARG PYTHON=\([0-9.]*\).*/\1/p' Dockerfile)
# One more than there are cores, for tests wait half of their time; whoever is out of work takes over
# tests of others, so that nobody waits for the last ones.
PARALLEL := -n $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1))) --maxprocesses 8 --dist worksteal
PURE := tests/model tests/evaluation tests/protocol
NODE_PACKAGES := tests/sdk-node/node_modules/.package-lock.json tests/sdk-edge/node_modules/.package-lock.json

.PHONY: help run hints test test-image pytest coverage nightly lint format lock bench image clean

help: ## what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile

run: $(VENV)/run hints ## start Relay with the demo flags on port 8030 (PORT=…)
	@PORT=$(PORT) exec $(BIN)/python -m relay serve --flags config/flags.yaml

hints:
	@sed -n '/^<!-- try it -->/,/^<!-- end -->/{/^<!--/d;/^```/d;p;}' README.md | sed 's/8030/$(PORT)/g; s|\.venv/|$(VENV)/|g'

test: lint coverage ## lint, types, import rules, all tests, and what they cover (PYTHON=…)
	@$(MAKE) --no-print-directory pytest PYTEST_ARGS="$(PURE:%=--ignore %) $(PYTEST_ARGS)"

test-image: ## all tests on the Python of the image, if this machine has it
	@python=$$(scripts/find-python $(IMAGE_PYTHON)) && $(MAKE) --no-print-directory pytest PYTHON=$$python

# In parallel first, but for tests that measure time. What fails is run once more alone, for a busy
# machine may miss time limits; what fails again has failed. Exit code 5: no test was chosen.
pytest: $(VENV)/test $(NODE_PACKAGES)
	$(call run-tests,-m "not timing",$(PARALLEL) --durations 20)
	$(call run-tests,-m timing)

define run-tests
$(BIN)/python -m pytest $(1) $(2) $(PYTEST_ARGS); \
  code=$$?; [ $$code = 1 ] || { [ $$code = 0 ] || [ $$code = 5 ]; exit; }; \
  $(BIN)/python -m pytest --last-failed $(1) $(PYTEST_ARGS)
endef

coverage: $(VENV)/test ## the tests of the pure folders, and the branches that they leave out
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(PARALLEL) $(PURE)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

nightly: $(VENV)/test $(NODE_PACKAGES) ## the tests that kill relays and those that make things up, many times over
	KILL_ROUNDS=200 $(BIN)/python -m pytest --timeout 3600 tests/events/test_spool.py tests/events/test_forwarder.py tests/contract/test_events.py tests/contract/test_stored_list.py
	FLEET_FAULTS=100 $(BIN)/python -m pytest --timeout 3600 tests/contract/test_fleet.py tests/contract/test_fleet_cluster.py tests/contract/test_fleet_histories.py
	WORKER_FAULTS=100 $(BIN)/python -m pytest --timeout 3600 tests/contract/test_worker_faults.py
	HISTORIES=100000 $(BIN)/python -m pytest $(PARALLEL) --timeout 3600 tests/fleet/test_simulation.py
	EXAMPLES=20000 $(BIN)/python -m pytest --timeout 3600 tests/model/test_journal.py tests/streams/test_delta_simulation.py tests/streams/test_client_side_simulation.py tests/evaluation/test_against_sdk.py tests/contract/test_credentials_at_run_time.py tests/test_environments_at_run_time.py tests/test_reload_sequences.py
	SDK_TEST_HARNESS_LONG=yes $(BIN)/python -m pytest --timeout 3600 -rs tests/harness

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/codespell

format: $(VENV)/test ## put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## choose the newest versions that pyproject.toml allows (needs uv)
	uv pip compile $(COMPILE) --extra aws --extra gcp pyproject.toml -o requirements.lock
	uv pip compile $(COMPILE) --all-extras -c requirements.lock pyproject.toml -o requirements-dev.lock
	for folder in tests/sdk-node tests/sdk-edge; do (cd $$folder && npm install --package-lock-only --no-audit --no-fund); done
	@touch tests/sdk-*/package-lock.json # npm has written into node_modules, too, without installing

# Neither the index that was asked nor this command line belongs into a lock.
COMPILE := --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
  --no-emit-index-url --no-emit-find-links --no-header --no-annotate

bench: $(VENV)/test ## measure (BENCH_ARGS="--peer …"; see bench/README.md)
	$(BIN)/python -m bench $(BENCH_ARGS)

image: ## the container image relay:latest
	docker build -t relay .

clean: ## remove what make made here
	rm -rf .venv .venv-* tests/sdk-*/node_modules tests/sdk-python/packages dist .*_cache .hypothesis .coverage*

# The lock of the tests holds everything that the lock of the program holds, in the same versions.
$(VENV)/run: requirements.lock scripts/venv
	$(PYTHON) scripts/venv $(VENV) $<
	@touch $@

$(VENV)/test: requirements-dev.lock scripts/venv
	$(PYTHON) scripts/venv $(VENV) $<
	@touch $(VENV)/run $@

$(NODE_PACKAGES): %/node_modules/.package-lock.json: %/package-lock.json scripts/node-packages
	scripts/node-packages $*
	@touch $@
