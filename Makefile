# Two commands for a fresh machine with Python 3.11 or newer and a C++ compiler: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CLIP ?= $(CURDIR)/clip.mp4
# Of that clip: video, audio, text.
TOKENS := 1456,51,60
PROMPT ?= A horse galloping through a cherry blossom forest at sunset

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that wait by spinning slow a shared machine down tenfold.
export OMP_WAIT_POLICY ?= PASSIVE
# What is tested is what is installed, never a checkout that happens to lie on the path.
unexport PYTHONPATH

# The oldest Triton that kernels are compiled with: it comes with torch 2.11.
OLDEST := $(VENV)/triton-3.6

# Whose products of eight bits ours are held against; apart, since diffusers imports it where it is installed.
RIVAL := $(VENV)/torchao

.PHONY: demo test install lint types gates suite slow golden bench clean

# The second command says what the compiler gains in each step of the clip.
demo: install
	$(BIN)/horsepower generate "$(PROMPT)" --duration 2 --output $(CLIP)
	$(BIN)/horsepower bench --quick --tokens $(TOKENS) --frames 13

test: lint types gates suite

install: $(VENV)/tools
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/pip install --quiet --no-deps --force-reinstall dist/horsepower-*.whl

$(VENV)/tools: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet .[dev]
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy --strict -p horsepower

# Every GPU kernel in every configuration, compiled and read; no GPU is needed.
gates: install $(OLDEST)
	for arch in sm_80 sm_90; do \
		$(BIN)/horsepower kernels --arch $$arch && PYTHONPATH=$(OLDEST) $(BIN)/horsepower kernels --arch $$arch || exit 1; \
	done

$(OLDEST): $(VENV)/tools
	PIP_CONSTRAINT= $(BIN)/pip install --quiet --no-deps --target $@ "triton==3.6.*"

suite: install $(RIVAL)
	$(BIN)/python -m pytest --numprocesses=auto --dist=worksteal
	PYTHONPATH=$(RIVAL) $(BIN)/python -m pytest tests/kernels/test_float8_torchao.py

$(RIVAL): $(VENV)/tools
	$(BIN)/pip install --quiet --no-deps --target $@ "torchao==0.18.0"

# Minutes and gigabytes.
slow: install
	$(BIN)/python -m pytest -m slow

# Recordings in the folder HORSEPOWER_GOLDEN.
golden: install
	$(BIN)/python -m pytest -m golden

bench: install
	$(BIN)/python -m pytest -m benchmark bench --benchmark-columns=median,iqr,rounds

clean:
	rm -rf $(VENV) build dist
