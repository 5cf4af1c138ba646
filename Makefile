# Every verb works in a fresh clone: the virtual environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test check bench clean

demo: $(INSTALLED)  ## compress the bundled model, measure it, let it talk
	$(BIN)/spqr demo

test: $(INSTALLED)  ## the whole suite; `make test ARGS="-k name"` for a part of it
	$(BIN)/pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder $(ARGS)

check: $(INSTALLED)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## the kernels, on this machine's CPU
	$(BIN)/spqr bench matmul --device cpu
	$(BIN)/spqr bench quantize --device cpu

clean:
	rm -rf $(VENV)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
