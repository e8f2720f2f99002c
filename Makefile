# `make help` lists what can be done here. Nothing has to be activated: the first call of a target makes
# the environment it needs, in .venv, and later calls find it there.

PYTHON ?= python3
ARGS ?=

.PHONY: help train sweep gpu test test-oldest test-compile test-ptx test-gpu mutants ptx-faults tile-facts lint format clean

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  ARGS="..."        is handed on: make train ARGS="--epochs 1", make test ARGS="-k softmax"'
	@echo '  PYTHON=python3.12 makes the environments with another Python, 3.11 or newer (make clean first)'

train: .venv/.ready  ## train the demo network on real digits and write what it learned to runs/
	.venv/bin/tilelab train $(ARGS)

sweep: .venv/.ready  ## time every tile of a kernel (with no GPU: compile and predict) and say why
	.venv/bin/tilelab sweep $(or $(ARGS),matmul)

gpu: .venv/.ready  ## all that needs a GPU: tests, ceilings, sweeps, training; goes on where it was ended
	.venv/bin/tilelab gpu $(ARGS)

test: .venv/.ready  ## run the tests, kernels interpreted on the CPU (no GPU needed)
	.venv/bin/python -m pytest $(IN_PARALLEL) -m "not gpu" $(ARGS)

test-oldest: .venv-oldest/.ready  ## run the core of the tests with the oldest supported triton
	.venv-oldest/bin/python -m pytest $(IN_PARALLEL) -m "core and not gpu" $(ARGS)

test-compile: .venv/.ready .venv-oldest/.ready  ## compile every kernel, compare with the facts; ARGS=--write writes them
	.venv/bin/python -m tests.tools.compile_facts $(ARGS)
	.venv-oldest/bin/python -m tests.tools.compile_facts --core $(ARGS)

test-ptx: .venv/.ready  ## execute the PTX of every kernel with no GPU, by all tests that are small enough (hours)
	@for target in sm_80 sm_90; do \
		echo .venv/bin/python -m pytest --on $$target --missed tests/kernels $(ARGS); \
		.venv/bin/python -m pytest $(IN_PARALLEL) --on $$target --missed tests/kernels $(ARGS) || exit; \
	done

test-gpu: .venv/.ready  ## run the tests on this machine's GPU, then those at real sizes, one by one
	@.venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "error: torch sees no GPU here: make test runs the tests without one" >&2; exit 1; }
	.venv/bin/python -m pytest $(IN_PARALLEL) -m "not gpu" $(ARGS)
	.venv/bin/python -m pytest -m gpu $(ARGS)

mutants: .venv/.ready  ## plant a fault in a kernel, one at a time, and see which test finds it (minutes)
	.venv/bin/python -m tests.tools.mutants $(ARGS)

ptx-faults: .venv/.ready  ## plant faults in the PTX of every kind of kernel, and see that perf/machine notices (an hour)
	.venv/bin/python -m tests.tools.ptx_faults $(ARGS)

tile-facts: .venv/.ready  ## compile every tile of the products, and write the facts that calls choose by (half an hour)
	.venv/bin/python -m tests.tools.tile_facts --write $(ARGS)

lint: .venv/.ready  ## check style and formatting
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

format: .venv/.ready  ## format the code and fix what can be fixed
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

clean:  ## remove the environments and every cache (runs/ stays)
	rm -rf .venv .venv-oldest build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The interpreter is one Python thread that calls BLAS for the dots: the tests gain from processes, and
# BLAS threads that wait for a busy core cost up to ten times what they bring. Its temporaries are
# megabytes: glibc is told to keep such memory, and not to give each back to the kernel (a tenth of a
# training step).
IN_PARALLEL := -n auto --maxprocesses 8 --dist worksteal
train sweep test test-oldest test-ptx test-gpu: export OPENBLAS_NUM_THREADS ?= 1
train test test-oldest test-ptx test-gpu: export MALLOC_MMAP_THRESHOLD_ ?= 33554432
train test test-oldest test-ptx test-gpu: export MALLOC_TRIM_THRESHOLD_ ?= 536870912
test test-oldest test-ptx test-gpu: export OMP_NUM_THREADS ?= 1
test test-oldest: export TRITON_INTERPRET := 1

# --- The environments -------------------------------------------------------------------------------
# .ready is written last, so an environment whose installation was interrupted is made anew, and one
# that is older than the files it was made from is brought up to date.

.venv/.ready: pyproject.toml constraints.txt
	$(install)
	@touch $@

.venv-oldest/.ready: pyproject.toml constraints.txt constraints-oldest.txt
	$(install)
	$(PIP) install --quiet --no-deps -r constraints-oldest.txt
	@touch $@

PIP = $(@D)/bin/python -m pip --disable-pip-version-check

# torch and the build tool first, at the versions of constraints.txt, so that nothing else chooses
# torch's build. Then the project.
define install
@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found:" \
	"install Python 3.11 or newer, or name yours: make PYTHON=/path/to/python3" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: tilelab needs" \
	"Python 3.11 or newer, name one: make PYTHON=/path/to/python3 ($(PYTHON) is" \
	"$$($(PYTHON) --version 2>&1 | head -n 1))" >&2; exit 1; }
@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make an" \
	"environment: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
@test -e $@ || { echo "making $(@D), once: a minute or two, and the downloads"; \
	$(PYTHON) -m venv --clear $(@D); }
@rm -f $@
$(PIP) install -c constraints.txt $$(grep -E '^(torch|hatchling)==' constraints.txt)
$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
endef
