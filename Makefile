PYTHON ?= .venv/bin/python

.PHONY: test lint bench demo gpu

test:
	$(PYTHON) -m pytest -n auto

lint:
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy

bench:
	$(PYTHON) -m pytest bench/ --benchmark-only --save-results && $(PYTHON) -m bench.report

demo:
	$(PYTHON) -m timefast.train --backbone timesformer

# everything that needs a GPU: its tests, all measurements, the result files and the tables made of them
gpu:
	TIMEFAST_EXPECT_GPU=1 $(PYTHON) -m pytest -m gpu
	$(PYTHON) -m pytest bench/ --benchmark-only --save-results
	$(PYTHON) -m bench.report
