# Every target makes the virtual environment it needs by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Workers that run tests side by side, one thread each.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo test unit lint types figures docs clean

demo: $(READY)
	$(BIN)/slimlstm demo

test: $(READY)
	$(PYTEST) tests/unit tests/recipes

unit: $(READY)
	$(PYTEST) --quick tests/unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

figures: $(READY)
	$(BIN)/slimlstm demo --plot build/demo.png --force --json > build/demo.json
	mv build/demo.json build/demo.png docs
	$(BIN)/python recipes/readme.py

docs: $(READY)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist
