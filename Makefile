# Every target makes its own virtual environment from the lock file; nothing need be installed
# beforehand but Python 3.11-3.13 and make (and Java 17+ with Maven for the Apache Kafka tests).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV := $(shell command -v uv 2>/dev/null)

.PHONY: help setup demo test docs docs-check faults fuzz audit lint format bench profile soak swaps train dashboards lock clean manifests
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "streamrec needs Python 3.11 to 3.13, found %d.%d: set PYTHON=python3.x" % v)'
ifneq ($(UV),)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
endif
	@touch $@

setup: $(STAMP) ## Make the virtual environment (.venv)

demo: $(STAMP) ## Replay real events through broker, worker and Redis on this machine
	$(BIN)/streamrec demo $(ARGS)

test: $(STAMP) ## Run all tests (ARGS="-k name" to select)
	$(BIN)/python -m pytest $(ARGS)

faults: $(STAMP) ## The fault matrix on Apache Kafka and Redis (ARGS="--only zombie", ARGS=--mutations)
	$(BIN)/python -m tests.faults $(ARGS)

fuzz: $(STAMP) ## Feed decoders broken bytes (ARGS="--inputs 10000000 --engine atheris")
	$(BIN)/python -m tests.fuzz $(ARGS)

audit: $(STAMP) ## Licences, an SBOM (build/sbom.cdx.json) and known vulnerabilities of what ships
	$(BIN)/python -m deploy.audit

lint: $(STAMP) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## Write the tables of settings and metrics in docs/ again, from the code
	$(BIN)/python -m worker.reference docs/*.md

dashboards: $(STAMP) ## Write the Grafana dashboards again, from deploy/grafana/generate.py
	$(BIN)/python -m deploy.grafana.generate

docs-check: $(STAMP) ## Run every command of the documentation in full; hours
	STREAMREC_DOCS_LONG=1 $(BIN)/python -m pytest tests/docs $(ARGS)

bench: $(STAMP) ## Compare the worker with other ways to do the same (ARGS=scale, ARGS=--help)
	$(BIN)/python -m benchmarks $(ARGS)

profile: $(STAMP) ## Flame graph of a loaded worker: build/profile/worker.svg
	$(BIN)/python -m benchmarks profile $(ARGS)

soak: $(STAMP) ## A loaded worker for 20 minutes: memory, lag, every event accounted for
	$(BIN)/python -m benchmarks soak $(ARGS)

# What `make train` makes of the float32 model; the last one ships.
RECIPES = half int8 int8:parts=table|ffn static+int8:parts=table weights:4 int4 blocks \
  mixed:objective=latency prune:0.5+int8 history:25+int4 neurons:0.5+prune:0.3+int4 layers:1+int8 \
  layers:1+neurons:0.75+prune:0.5+int4+finetune:3
SOURCE ?= ml-100k
TRAIN_ARGS ?=

swaps: $(STAMP) ## Swap models under load (ARGS="--swaps 100": memory over many)
	$(BIN)/python -m benchmarks swaps $(ARGS)

train: $(STAMP) ## Train, compress and report (SOURCE=ml-100k): build/models, build/report
	rm -rf build/models build/report
	$(BIN)/streamrec models train $(SOURCE) --registry build/models $(TRAIN_ARGS)
	$(BIN)/streamrec models compress build/models/posts/*-fp32 --events $(SOURCE) --registry build/models \
	  $(foreach recipe,$(RECIPES),--recipe '$(recipe)')
	$(BIN)/streamrec models report build/models/posts/* --reference build/models/posts/*-fp32 \
	  --events $(SOURCE) --baselines --out build/report

COMPILE = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-annotate --no-header
# What ships has the versions that are tested.
SHIP = $(COMPILE) --constraints requirements.lock

lock: ## Resolve all lock files again (needs uv)
	$(COMPILE) --all-extras pyproject.toml -o requirements.lock
	$(SHIP) --extra remote --extra signed pyproject.toml -o deploy/container/worker.lock
	$(SHIP) --extra remote --extra signed --extra train pyproject.toml -o deploy/container/models.lock
	$(SHIP) --extra s3 pyproject.toml -o deploy/container/s3.lock
	$(SHIP) deploy/container/build.in -o deploy/container/build.lock
	sed -nE 's/^((numpy|onnxruntime|msgspec|redis|hiredis)==.*[^ ]) \\$$/\1/p' requirements.lock \
	  | $(COMPILE) --constraints - benchmarks/quix.in -o benchmarks/quix.lock

manifests: ## Render deploy/kustomize from the Helm chart (needs helm)
	deploy/kustomize/render.sh

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache build dist *.egg-info
