# Everything happens in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint format clean

help:
	@echo "make demo    install, plant a backdoor, remove it, write $(OUT)/report.html"
	@echo "make test    install, run all tests (real data: BDU_DATA=FOLDER)"
	@echo "make bench   install, time the fused step against its rivals"
	@echo "make lint    ruff, clang-format, mypy"

# The stamp is newer than what the installation was made from; sources in Python are used in place.
.venv/installed: pyproject.toml constraints.txt $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,triton]'
	touch $@

demo: .venv/installed
	$(BIN)/bdu demo --out $(OUT)

test: .venv/installed
	$(BIN)/python -m pytest

bench: .venv/installed
	$(BIN)/python bench/step.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

clean:
	rm -rf .venv build
