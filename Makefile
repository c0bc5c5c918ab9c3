# make quickstart   set up, then the main job end to end on handwritten digits
# make test         set up, then every test
# make check        format, lint, types, the layer test and the fast tests
# make offline-wheels PYTHON=3.12 HAVE=freeze.txt   collect the wheels that a machine without a network lacks in wheels/
# make gpu          the tests that need a GPU, then speed and memory on it (PYTHON_OF_GPU=python3 without a .venv)
# make docker-check  build the CPU image and run it: needs root, buildah, podman, runc and mmdebstrap
PYTHON ?= python3
BIN := .venv/bin
PYTHON_OF_GPU ?= $(BIN)/python
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# pip compiles nothing (all packages take a minute); Python does, when it first imports a module.
export PYTHONDONTWRITEBYTECODE =

.PHONY: quickstart test check lint compiled format gpu docker-check offline-wheels setup clean

quickstart: setup
	@$(BIN)/vaescale quickstart

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder

check: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder -m "not slow and not distributed"

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# All that the tests import, compiled by one process: in a new .venv each of the four workers would compile it at the same time.
compiled: setup
	@OMP_NUM_THREADS=1 $(BIN)/pytest --collect-only --quiet -p no:cacheprovider > .venv/compiled

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

gpu:
	$(PYTHON_OF_GPU) -m tools.bench.gpu --out gpu

docker-check:
	docker/check.sh

# PYTHON is the version of the other machine's Python here, and HAVE the file with what `pip list --format=freeze` prints there.
# EXTRAS=deepspeed adds an extra of setup.py, and WITHOUT="mlflow datasets" leaves packages out.
OUT ?= wheels
offline-wheels:
	@$(or $(wildcard $(BIN)/python),python3) docker/offline_wheels.py $(OUT) --python $(PYTHON) $(if $(HAVE),--have $(HAVE)) \
		$(if $(EXTRAS),--extras $(EXTRAS)) $(if $(WITHOUT),--without $(WITHOUT))

setup: .venv/installed

# What pip writes is asked after the folders of the path. In a folder that holds a clone, Python would take the clone itself for a package.
define CLONE_ON_THE_PATH
import os, pathlib, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "__editable__.vaescale_clone.pth").write_text(os.getcwd() + "\n")
endef
export CLONE_ON_THE_PATH

# torch first and by itself: DeepSpeed asks for it while it is built, and what comes later must not replace it.
.venv/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version}; try make PYTHON=python3.12")'
	@echo "== setting up .venv (minutes on the first call)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch setuptools wheel
	@$(PIP) --no-build-isolation --editable '.[deepspeed,dev]'
	@$(BIN)/python -c "$$CLONE_ON_THE_PATH"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
