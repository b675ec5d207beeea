# Everything that a fresh clone needs; `make help` lists it. PYTHON=/path/to/python3.12 overrides the search.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/python -m launch

# The first Python >= 3.12 on PATH that can make a virtual environment.
FIND_PYTHON = IFS=:; for version in 3.13 3.12 3.14 3 ""; do for folder in $$PATH; do \
	candidate=$$folder/python$$version; \
	[ -x "$$candidate" ] && "$$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	&& echo "$$candidate" && exit; done; done
ifndef PYTHON
PYTHON := $(shell $(FIND_PYTHON))
endif

# Where it is set, each of many hundred processes would compile anew what it imports, which takes 2 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install wheelhouse image image-check quickstart test test-slow test-all test-oldest infra lint bench docs release release-check clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "error: no Python >= 3.12 with venv on PATH; install one (Debian: python3 python3-venv) or set PYTHON=/path/to/python" >&2; exit 1; fi
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Installs what follows with uv, in a third of pip's time; where uv cannot (a mirror that only pip is told of), with pip.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
define install
	$(PIP) uv
	UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt $(1) || $(PIP) $(1)
endef

# Where WHEELHOUSE names a folder of packages, they come from there alone, without a network.
ifdef WHEELHOUSE
export PIP_NO_INDEX := 1
export UV_OFFLINE := 1
export PIP_FIND_LINKS := $(abspath $(WHEELHOUSE))
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
endif
OURS := .$(if $(EXTRAS),[$(EXTRAS)])

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,-e '$(OURS)')
	@touch $@

install: | $(BIN)/python ## install into .venv, with EXTRAS=mlflow,sign; from a folder of packages alone with WHEELHOUSE=DIR
	$(call install,-e '$(OURS)')
	@touch $(VENV)/.installed

wheelhouse: | $(BIN)/python ## download what `make install` needs into wheelhouse/, for machines without a network
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --dest wheelhouse -c constraints.txt uv hatchling editables '$(OURS)'
	@rm -f wheelhouse/jaxinfra-*
	@du -sh wheelhouse

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,-e '.[test]')
	@touch $@ $(VENV)/.installed $(VENV)/.installed-docs

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,-e '.[docs]')
	@touch $@ $(VENV)/.installed

image-check:
	$(if $(filter-out cpu cuda tpu,$(KIND)),$(error KIND=$(KIND): expected cpu, cuda or tpu))

image: | image-check $(BIN)/python ## build the image with buildah, without root and a registry: KIND=cpu, cuda or tpu; RUN="COMMAND" runs in it
	$(call install,-e '.[sign]')
	PYTHON=$(BIN)/python launch/image.sh "$(or $(KIND),cpu)" $(RUN)

quickstart: $(VENV)/.installed ## prepare real text, train on it, show the loss curve and a sample: 2 minutes
	$(LAUNCH) data prepare configs/data/python_stdlib.py
	$(LAUNCH) configs/quickstart.py
	$(LAUNCH) sample runs/quickstart "def main(" --max-tokens 120

# Torch, Transformers, TRL and lm-eval's model of Transformers stay out of the environment that trains; tests start this
# Python to compare with them.
# Python 3.11 if there is one, for which a machine may have builds of torch without CUDA, then the one that trains.
TORCH := .venv-transformers
TORCH_PYTHON = for candidate in python3.11 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.11.*/bin/python3.11 "$(PYTHON)"; do \
	"$$candidate" -c 'import ensurepip' 2>/dev/null && echo "$$candidate" && exit; done

$(TORCH)/.installed: Makefile
	"$(shell $(TORCH_PYTHON))" -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check "torch>=2.6" "transformers[serving]>=5" "trl>=1.16" \
		"ctranslate2>=4" "lm-eval[hf]>=0.4.9" "bitsandbytes>=0.45"
	@touch $@

# What reads launch/infra. The classes of the providers of Terraform stay in their wheels, which tests open.
INFRA := .venv-infra

$(INFRA)/.installed: Makefile $(VENV)/.installed-test
	"$(BIN)/python" -m venv $(INFRA)
	UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --quiet --python $(INFRA)/bin/python \
		checkov==3.3.30 ansible-core==2.21.5 ansible-lint==26.10.1 tfparse==0.6.22
	$(INFRA)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(INFRA)/providers \
		cdktf-cdktf-provider-google==16.12.1 cdktf-cdktf-provider-google-beta==16.12.1
	@touch $@

# Feast refuses pandas 3 and other packages that train: docs/sources.md.
FEAST := .venv-feast

$(FEAST)/.installed: Makefile pyproject.toml constraints.txt $(VENV)/.installed-test
	"$(BIN)/python" -m venv $(FEAST)
	UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --quiet --python $(FEAST)/bin/python \
		-c <(grep -vE '^(pandas|prometheus_client|tenacity)=' constraints.txt) -e . feast==0.67.0
	@touch $@

infra: $(INFRA)/.installed ## check what makes machines: launch/infra
	$(BIN)/python -m pytest tests/infra

# A fifth of the time in which XLA compiles toy programs is glibc's malloc. Where jemalloc is installed, the workers have
# it in its place; what they start has glibc's (tests/conftest.py).
JEMALLOC = LD_PRELOAD=$(firstword $(wildcard /usr/lib/*/libjemalloc.so.2 /usr/lib64/libjemalloc.so.2))

# One session: the slow tests first, shared out over the workers (tests/conftest.py). Four workers keep two cores busy:
# tests wait for processes, servers and outages.
PYTEST = $(JEMALLOC) $(BIN)/python -m pytest -n 4 --dist worksteal --durations 30 --durations-min 15

test: lint ## install what tests need, lint, and run the fast tests
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-test $(TORCH)/.installed $(INFRA)/.installed $(FEAST)/.installed ## run the slow tests
	$(PYTEST) -m slow

test-all: lint $(TORCH)/.installed $(INFRA)/.installed $(FEAST)/.installed ## lint, and run all tests, fast and slow
	$(PYTEST)

# The oldest Python that is supported and here, in a place of pyenv's too, with the oldest JAX.
OLDEST := .venv-oldest
OLDEST_PYTHON = for candidate in python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12.*/bin/python3.12 "$(PYTHON)"; do \
	"$$candidate" -c 'import ensurepip' 2>/dev/null && echo "$$candidate" && exit; done

$(OLDEST)/.installed: pyproject.toml constraints.txt constraints-oldest.txt $(VENV)/.installed-test
	"$(shell $(OLDEST_PYTHON))" -m venv $(OLDEST)
	UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --quiet --python $(OLDEST)/bin/python -c constraints-oldest.txt \
		-c <(grep -v '^jax' constraints.txt) -e '.[places]' pytest pytest-xdist
	@touch $@

test-oldest: $(OLDEST)/.installed ## run a small set with the oldest Python and JAX that are supported
	$(JEMALLOC) $(OLDEST)/bin/python -m pytest -n 2 -m jax_range tests/cli tests/checkpoint tests/models tests/ops tests/parity

lint: $(VENV)/.installed-test ## ruff, pyright and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.installed ## time the train step against hand-written code
	$(LAUNCH) bench step

docs: $(VENV)/.installed-docs ## write the documentation with the API into site/, to open in a browser
	$(BIN)/mkdocs build --quiet --strict --config-file .mkdocs.yml

release: release-check $(VENV)/.installed-test ## set VERSION=X.Y.Z, date the changelog, and build the sdist and the wheel into dist/
	@$(BIN)/python tests/release.py "$(VERSION)"

release-check: # before anything is installed
	@"$(PYTHON)" tests/release.py "$(VERSION)" --check

clean: ## remove what was installed and built; runs and stores stay
	rm -rf $(VENV) $(OLDEST) $(TORCH) $(INFRA) $(FEAST) .cache .pytest_cache .ruff_cache .import_linter_cache build dist site *.egg-info
