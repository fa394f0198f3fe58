# Everything a developer does. Installing happens once, and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
# Tests start hundreds of processes, each of which would compile our modules again.
unexport PYTHONDONTWRITEBYTECODE

# Compiled by all cores: pip would take one. What cannot be compiled is never imported.
define install
$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt $(1)
@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
endef

.DEFAULT_GOAL := help
.PHONY: help venv install lint docs test pytest test-slow coverage test-lowest demo page \
	crash-proof soak fuzz ledger-proof ranks-proof fault-table deploy-check lock sbom audit \
	bench-env bench-step-cost bench-scaling bench-solver bench-gpu bench-scale-out bench-memory bench-mask-refresh bench-learning bench-claims bench-fidelity bench-ingest bench-telemetry

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(BIN)/python ## Create the virtual environment

install: $(VENV)/.installed ## Install the service with everything that its tests need

lint: $(VENV)/.installed ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/.installed ## Build the documentation into build/site; a dead link or a missing page is an error
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

test: lint docs pytest ## Check style, types and documentation, and run every test; this is what CI runs

# The tests' models are so small that threads only wait for each other: one each, and a process for each core.
pytest: $(VENV)/.installed ## Run every test but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed ## Run the tests that take long: two trainers, three brokers, soak, large files
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow

coverage: $(VENV)/.installed ## Run every test, and say which lines of the packages none of them reached
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term-missing:skip-covered

test-lowest: .venv-lowest/.installed ## Run the tests with the lowest versions that pyproject.toml promises
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n $(WORKERS) --dist loadfile --ignore=tests/docs -W default

# The short forms of these three are among the tests. Soak needs an Apache Kafka at KAFKA_HOME; so does PLACE=--kafka.
SEEDS ?= 200
MINUTES ?= 30
RECORDS ?= 100000
ROWS ?= 100000000
KILLS ?= 30
SUMMARY ?= build/crash-proof.json

crash-proof: $(VENV)/.installed ## Kill the service at every point, SEEDS times each way; it must end as if nothing had happened
	@mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.system.faults.crash_proof --seeds $(SEEDS) --summary $(SUMMARY) $(PLACE)

soak: $(VENV)/.installed ## Train for MINUTES at full speed while the broker restarts; nothing may grow, or be lost
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.system.faults.soak --minutes $(MINUTES)

fuzz: $(VENV)/.installed ## Feed RECORDS random records to the decoder and the service, and random trees to the settings
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.system.faults.fuzz --records $(RECORDS) --examples 2000

ledger-proof: $(VENV)/.installed ## Ask a ledger of ROWS rows, made for it; no question may take a second
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.helpers.ledgers --rows $(ROWS)

ranks-proof: $(VENV)/.installed ## Show that 1, 2 and 3 processes make the same run, kill them KILLS times, and let some idle for ten minutes
	OMP_NUM_THREADS=1 STREAM_TRAINER_KILLS=$(KILLS) $(BIN)/python -m pytest -m slow tests/system/ranks

fault-table: $(VENV)/.installed ## Do faults to a trainer that Prometheus watches: seconds to alert, lines, recovery; needs root for one
	@mkdir -p build
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(BIN)/python -m tests.system.operations.fault_table --json build/faults.json

deploy-check: $(VENV)/.installed ## Start Kafka, trainer, Prometheus and Alertmanager here; an alert must fire and resolve
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(BIN)/python -m deploy.as_processes

lock: .venv-supply/.installed ## Resolve anew what the image installs, into deploy/*.lock with hashes
	.venv-supply/bin/python deploy/lock.py

sbom: .venv-supply/.installed ## Write what the image is made of to build/sbom.json, as CycloneDX
	@mkdir -p build
	cat deploy/*.lock | .venv-supply/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o build/sbom.json -

audit: .venv-supply/.installed ## Look for known vulnerabilities in what the image installs; needs PyPI, or fails
	.venv-supply/bin/pip-audit --strict --disable-pip --require-hashes -r deploy/requirements.lock -r deploy/torch-cuda.lock

demo: $(VENV)/.installed-demo ## Broker, stream, training and report on this machine
	$(BIN)/stream-trainer demo

bench-env: .venv-opacus/.installed .venv-dattri/.installed ## Install the peers that benchmarks compare with

bench-step-cost: $(VENV)/.installed ## Measure what a step costs, against plain training and peers
	@mkdir -p build
	$(BIN)/python -m benchmarks.step_cost --json build/step_cost.json

bench-scaling: $(VENV)/.installed ## Measure how the cost of a step grows with each of its dimensions
	@mkdir -p build
	$(BIN)/python -m benchmarks.step_cost.scaling --json build/scaling.json

bench-solver: $(VENV)/.installed ## Measure how long the quadratic program of a step takes
	@mkdir -p build
	$(BIN)/python -m benchmarks.solver --json build/solver.json

bench-gpu: $(VENV)/.installed ## Measure what a selecting step costs on one GPU, in eight minutes
	@mkdir -p build
	$(BIN)/python -m benchmarks.gpu --json build/gpu.json

bench-scale-out: $(VENV)/.installed ## Measure what a step costs on two processes, and what they send: a quarter of an hour
	@mkdir -p build
	$(BIN)/python -m benchmarks.scale_out --json build/scale_out.json

bench-memory: $(VENV)/.installed ## Measure the peak memory of a step on long samples
	@mkdir -p build
	$(BIN)/python -m benchmarks.memory --json build/memory.json

bench-mask-refresh: $(VENV)/.installed ## Measure what a refresh of the DualSFT mask costs against a plain step
	@mkdir -p build
	$(BIN)/python -m benchmarks.mask_refresh --json build/mask_refresh.json

bench-telemetry: $(VENV)/.installed ## Measure what watching a run costs a step, and how long a scrape takes
	@mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.telemetry --json build/telemetry.json

# The rest reads real data: DATA names a directory with stream/, target/ and test/, the ingest a broker at KAFKA_HOME.
bench-learning: $(VENV)/.installed-bench ## Measure what selection buys on DATA, for hours; finished runs are kept
	@mkdir -p build
	TQDM_DISABLE=1 $(BIN)/python -m benchmarks.learning --data $(DATA) --json build/learning.json --plots build/learning

bench-claims: $(VENV)/.installed ## Measure what the four papers claim, each in direction, on DATA
	@mkdir -p build
	TQDM_DISABLE=1 $(BIN)/python -m benchmarks.claims --data $(DATA) --json build/claims.json

bench-fidelity: $(VENV)/.installed-bench ## Measure what the cheaper geometries cost a real model's choices on DATA
	@mkdir -p build
	TQDM_DISABLE=1 $(BIN)/python -m benchmarks.fidelity --data $(DATA) --json build/fidelity.json

page: $(VENV)/.installed ## Write docs/benchmarks.md from what is in benchmarks/results
	$(BIN)/python -m benchmarks.page --results benchmarks/results --out docs/benchmarks.md

bench-ingest: $(VENV)/.installed-bench ## Measure how fast records come in
	@mkdir -p build
	$(BIN)/python -m benchmarks.ingest --json build/ingest.json

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml selectors/pyproject.toml constraints.txt | $(BIN)/python
	$(call install,-e ./selectors -e ".[test]")
	@touch $@ $(VENV)/.installed-demo

.venv-lowest/.installed: pyproject.toml selectors/pyproject.toml lowest.txt
	$(PYTHON) -m venv $(@D)
	@echo '*' > $(@D)/.gitignore
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c lowest.txt -e ./selectors -e ".[lora,demo,gguf,upload,ledger,tensorboard,otlp]" pytest pytest-timeout pytest-xdist hypothesis psutil
	@touch $@

.venv-supply/.installed: Makefile
	$(PYTHON) -m venv $(@D)
	@echo '*' > $(@D)/.gitignore
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8' 'cyclonedx-bom>=7' 'pip-audit>=2.9'
	@touch $@

$(VENV)/.installed-demo: pyproject.toml selectors/pyproject.toml constraints.txt | $(BIN)/python
	$(call install,-e ./selectors -e ".[demo]")
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(call install,-e ./selectors -e ".[bench]")
	@touch $@

.venv-opacus/.installed: PEER := opacus==1.6.0
.venv-dattri/.installed: PEER := dattri-llm==0.1.0

# A torchvision or torchaudio that does not fit our torch would keep transformers from being imported.
.venv-opacus/.installed .venv-dattri/.installed: pyproject.toml selectors/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	@echo '*' > $(@D)/.gitignore
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ./selectors -e ".[lora]" $(PEER)
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	@touch $@
