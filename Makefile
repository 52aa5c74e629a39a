PYTHON ?= python3
VENV := .venv
DEMO_FLAGS ?=
GPU_FLAGS ?=
TEST_FLAGS ?=

.PHONY: demo gpu test lint clean

# A venv of its own with everything that the tests and the demo need.
$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

# Train a small masked MDTv2 on real handwritten digits, draw and grade 1,000 of them.
demo: $(VENV)/installed
	$(VENV)/bin/python scripts/digits/demo.py $(DEMO_FLAGS)

# Measure this machine's GPU in 9 minutes: benchmarks/DATE-DEVICE.md and .json. Run again, it goes on where it stopped.
gpu: $(VENV)/installed
	$(VENV)/bin/python scripts/measure_gpu.py $(GPU_FLAGS)

# Two files of tests at a time, each in a process of one thread; files in the order of their names, which ends with quick ones.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TEST_FLAGS)

lint: $(VENV)/installed
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info
