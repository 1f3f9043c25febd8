# Two commands do everything on a fresh machine:  make demo  ·  make test
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-long test-foreign test-interpreter lint fix docs bench bench-gpu study clean

demo: .venv/installed
	$(BIN)/saekit demo --out demo

test: .venv/tested
	@tests/chromium.sh
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not long and not demo" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m demo
	@$(MAKE) --no-print-directory test-interpreter

# kernels in Triton's interpreter need a process of their own: the flag is read once, at import
test-interpreter: .venv/tested
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/interpreter
	TRITON_INTERPRET=1 $(BIN)/python kernels/benchmarks/micro.py --tiny >/dev/null

test-long: .venv/tested
	@tests/chromium.sh
	$(BIN)/python -m pytest -m long

# each requirements file there is an environment of its own, made from PyPI
test-foreign: .venv/tested
	SAEKIT_FOREIGN=1 $(BIN)/python -m pytest tests/foreign

lint: .venv/tested
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

fix: .venv/tested
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: .venv/tested
	$(BIN)/python docs/rewrite.py

# make bench OP=decode times that op alone
bench: .venv/tested
	$(BIN)/python kernels/benchmarks/bench.py $(if $(OP),--op $(OP))
ifndef OP
	$(BIN)/python kernels/benchmarks/step.py --save
	$(BIN)/python kernels/benchmarks/step.py --aux --shape 2048,768,24576,32 --save
	$(BIN)/python tests/benchmarks/demo.py
	$(BIN)/python tests/benchmarks/store.py
	$(BIN)/python tests/benchmarks/index.py --keep --peer
	$(BIN)/python tests/benchmarks/browser.py
	$(BIN)/python tests/benchmarks/sweep.py
	$(BIN)/python tests/benchmarks/sweep.py --model smollm2
	$(BIN)/python tests/benchmarks/collect.py --model saekit:demo --peer
	$(BIN)/python tests/benchmarks/collect.py --model smollm2 --peer
endif

# rows go to $(OUT)/results.csv; GPU_PYTHON names a Python that has a CUDA build of torch and, to be compared with, the peers
OUT ?= bench-gpu
bench-gpu: GPU_PYTHON ?= $(BIN)/python
bench-gpu: $(if $(GPU_PYTHON),,.venv/tested)
	-PYTHONPATH=.:kernels timeout 150 $(GPU_PYTHON) -m pytest -p no:cacheprovider tests/interpreter
	-PYTHONPATH=.:kernels timeout 90 $(GPU_PYTHON) kernels/benchmarks/micro.py --save --results $(OUT)/results.csv
	PYTHONPATH=.:kernels timeout 60 $(GPU_PYTHON) kernels/benchmarks/bench.py --device cuda --compute bf16 --shape 8192,2304,65536,64 \
	  --save --results $(OUT)/results.csv $(if $(OP),--op $(OP))
	PYTHONPATH=.:kernels timeout 180 $(GPU_PYTHON) kernels/benchmarks/step.py --device cuda --save --results $(OUT)/results.csv --budget 120

study: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[study]'
	$(BIN)/python docs/study/variants.py

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "no python3 found; saekit needs Python 3.11 or later"; exit 1; }
	$(PYTHON) -m venv .venv || { echo "python3 -m venv failed; on Debian:  apt-get install python3-venv"; exit 1; }

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv demo test-artifacts dist
