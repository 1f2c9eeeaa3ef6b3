# make demo needs Python 3.11 or newer and nothing else: the rest, etcd included, comes from PyPI into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS = $(wildcard protos/vfleet/v1/*.proto)
SERVICES = $(wildcard protos/vfleet/v1/*_service.proto)
# protoc finds its plugins on PATH.
GENERATE = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos

# A daemon starts in half the time if the bytecode of what it imports is kept; images of containers often forbid it.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help bench-guest demo images up down destroy test bench chaos flood kill-matrix demo-guest guest guest-image guest-matrix promtool model simulate simulate-bugs mutation lint proto clean
.DELETE_ON_ERROR:

help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## Show functions move twice under a driver at work
	$(BIN)/vfleet demo

images: $(VENV)/installed ## Build the images of vfleet and etcd (deploy/docker)
	PYTHON=$(BIN)/python deploy/docker/images.sh

up: $(VENV)/installed ## Bring a fleet of three machines up in containers (deploy/compose)
	PYTHON=$(BIN)/python deploy/compose/up.sh

down: ## End it; what it has on disk stays
	deploy/compose/up.sh down

destroy: ## End it, and nothing of it stays
	deploy/compose/up.sh destroy

test: $(VENV)/installed-dev ## Run the tests
	-@command -v promtool >/dev/null || $(MAKE) --no-print-directory promtool
	$(BIN)/pytest -n auto --dist worksteal

bench: $(VENV)/installed-dev ## Measure against bare programs, all or NAMES="a b", print a table and write JSON=bench.json
	PYTHONPATH=tests $(BIN)/python -m benchmarks $(NAMES) --json $(or $(JSON),bench.json)

chaos: $(VENV)/installed-dev ## Let everything fail for DURATION=300 seconds, by SEED=n, and check what is left
	PYTHONPATH=tests $(BIN)/python -m fault.chaos --duration $(or $(DURATION),300) $(if $(SEED),--seed $(SEED))

flood: $(VENV)/installed-dev ## Let CLIENTS=1000 do their worst to a cluster for DURATION=60 seconds, and print what it felt
	PYTHONPATH=tests $(BIN)/python -m fault.flood --clients $(or $(CLIENTS),1000) --duration $(or $(DURATION),60)

kill-matrix: $(VENV)/installed-dev ## Kill and freeze everyone at every step of a migration, and print how each ended
	PYTHONPATH=tests $(BIN)/python -m fault.kill_matrix

promtool: .cache/promtool ## Get promtool, which tests of alerts need, from Debian's package of Prometheus

bench-guest: $(VENV)/installed-dev ## Measure what a guest waits for, over bare programs and beside what QEMU has, print a table and write JSON
	PYTHONPATH=tests $(BIN)/python -m benchmarks guest_access guest_machine guest_today --json $(or $(JSON),bench-guest.json)

demo-guest: $(VENV)/installed-dev ## Show functions of two Linux guests go from host to host ten times, and what the guests see of it
	PYTHONPATH=tests $(BIN)/python -m guests.demo

guest: $(VENV)/installed-dev ## Run a Linux guest in this terminal, with the functions behind SOCKETS="/tmp/a.sock /tmp/b.sock"
	PYTHONPATH=tests $(BIN)/python -m guests.shell $(SOCKETS)

guest-image: ## Make what a guest is run with (QEMU, kernel, initramfs), of Debian packages, and print its folder
	tests/guests/image.sh

guest-matrix: $(VENV)/installed-dev ## Under a Linux guest at work, kill everyone at every step of a move, and falsify what moves
	$(BIN)/pytest tests/guests/test_kills.py tests/guests/test_falsified.py --all-cells

model: ## Search all states of the protocol's models, with Spin and a C compiler; take each rule away
	nice -n 19 $(PYTHON) tests/model/check.py

simulate: $(VENV)/installed-dev ## Simulate SEEDS=2000 fleets in which everything fails, or show the run of SEED=n
	PYTHONPATH=tests $(BIN)/python -m simulation $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),2000)) $(if $(BUG),--bug $(BUG))

simulate-bugs: $(VENV)/installed-dev ## Plant known bugs, and see that the simulation finds each
	PYTHONPATH=tests $(BIN)/python -m simulation --bugs

mutation: $(VENV)/installed-mutation ## Change the code of transactions and fences everywhere, and see that tests fail
	rm -rf mutants
	nice -n 19 $(BIN)/mutmut run
	$(BIN)/python tests/mutation/report.py

fuzz: $(VENV)/installed-dev ## Feed what reads outside input anything, for SECONDS=60 each, all or TARGETS="a b"
	PYTHONPATH=tests $(BIN)/python -m fuzz $(TARGETS) --seconds $(or $(SECONDS),60)

lint: $(VENV)/installed-dev ## Check style, types, protos, and that the stubs are those of the protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd protos && ../$(BIN)/buf lint
	@release=$$(git describe --tags --match 'v*' --abbrev=0 2>/dev/null) || exit 0; \
	cd protos && ../$(BIN)/buf breaking --against "$$(git rev-parse --absolute-git-dir)#tag=$$release,subdir=protos"
	@stubs=$$(mktemp -d) && trap 'rm -rf "$$stubs"' EXIT && \
	$(call generate,$$stubs) && \
	diff -rq --exclude=__pycache__ --exclude=__init__.py "$$stubs/vfleet/v1" vfleet/v1 || \
	{ echo "vfleet/v1 is not what protos/ generates: run make proto" >&2; exit 1; }

proto: $(VENV)/installed-dev ## Generate the stubs from protos/
	@stubs=$$(mktemp -d) && trap 'rm -rf "$$stubs"' EXIT && \
	$(call generate,$$stubs) && \
	rm -f vfleet/v1/*_pb2* && cp "$$stubs"/vfleet/v1/* vfleet/v1/

clean: ## Remove what the other targets made
	rm -rf $(VENV) .cache .fuzz build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define generate
$(GENERATE) --python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS) && $(GENERATE) --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(SERVICES)
endef

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is too old or missing: vfleet needs Python 3.11 or newer (make PYTHON=…)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	{ echo "$(PYTHON) can't make virtual environments: install its venv package (Debian: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	@echo "Installing vfleet and what it needs into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing vfleet and what its development needs into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(VENV)/installed $@

# Unpacked, not installed: a server that would start by itself comes with it.
.cache/promtool:
	@set -e; mkdir -p .cache; new=$$(mktemp -d .cache/new.XXXXXX); trap 'rm -rf "$(CURDIR)/$$new"' EXIT; cd "$$new"; \
	apt-get -o APT::Sandbox::User=root download -q prometheus || { apt-get update -q && apt-get -o APT::Sandbox::User=root download -q prometheus; }; \
	dpkg-deb -x prometheus_*.deb unpacked; mv unpacked ../promtool

$(VENV)/installed-mutation: $(VENV)/installed-dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mutation]'
	@touch $@
