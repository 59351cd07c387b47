# One command for each want; CI calls the same targets. Needs make and Python 3.11 or newer with venv and pip.

PYTHON ?= python3
# Installed before everything else, without hashes: the CPU and CUDA builds of one version come from different places.
# For another build: make setup TORCH='torch==2.13.0 --index-url <the index of that build>'
TORCH ?= torch==2.13.0
IMAGE ?= lora-merge-action:dev
BASE_IMAGE ?=
# make test T=tests/files/test_layout.py WORKERS=0
T ?=
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
LOCKS := requirements.lock requirements-dev.lock
CODE := $(wildcard cleanup.py entrypoint.py runner tests demo bench tools)
# Compiled programs in wheels need the tools' folder on PATH: actionlint calls shellcheck.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Threads that spin while they wait make two test workers on two cores many times slower.
export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fix lock image bench clean

help: ## what there is
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

setup: $(READY) ## .venv with everything the other targets need

$(READY): $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --require-hashes --no-deps -r requirements.lock -r requirements-dev.lock
	$(PIP) check
	touch $@

demo: $(READY) ## merge, verify and publish a real adapter to a Hub on this machine, then load it
	$(BIN)/python -m demo.run

# One thread for each worker: the tensors are tiny, and there are as many workers as cores.
test: $(READY) ## all tests; those in a container are skipped where no engine answers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) $(T)

CHECKS := check-format check-lint check-types check-imports check-schemas check-workflows check-docker check-shell check-tables
.PHONY: $(CHECKS)

check: $(CHECKS) ## format, lint, types, import contracts, schemas, workflows, Dockerfile; `make -k check` goes on after a failure

check-format: $(READY)
	$(BIN)/ruff format --check .

check-lint: $(READY)
	$(BIN)/ruff check .

check-types: $(READY)
	$(BIN)/mypy $(CODE)

check-imports: $(READY)
	$(BIN)/lint-imports

check-schemas: $(READY)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-actions action.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml examples/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

check-workflows: $(READY)
	$(BIN)/actionlint .github/workflows/*.yml examples/*.yml
	$(BIN)/zizmor --offline --no-progress --quiet . examples/*.yml

check-docker: $(READY)
	$(BIN)/hadolint Dockerfile

check-shell: $(READY)
	$(BIN)/shellcheck .ci/run

check-tables: $(READY)
	$(BIN)/python -m tools.tables --check
	$(BIN)/python -m tools.coverage --check
	$(BIN)/python -m tools.refusals --check

fix: $(READY) ## format, repair what ruff can, rewrite the generated tables
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m tools.tables
	$(BIN)/python -m tools.coverage

UV_LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--fork-strategy fewest --override requirements-override.in

lock: $(READY) ## requirements*.in to requirements*.lock; UV_ARGS=--upgrade takes newer versions
	$(UV_LOCK) $(UV_ARGS) -o requirements.lock requirements.in
	$(UV_LOCK) $(UV_ARGS) -o requirements-dev.lock requirements-dev.in

image: ## the container image
	docker build $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) --build-arg TORCH='$(TORCH)' -t $(IMAGE) .

bench: $(READY) ## wall time and memory beside copies, PEFT and, where `python -m bench.peers setup` was run, other peers
	$(BIN)/python -m bench.merge $(BENCH_ARGS)

clean: ## remove what the targets made, the demo's downloads included
	rm -rf $(VENV) .demo .bench .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis lora-merge-report
