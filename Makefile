PYTHON ?= .venv/bin/python

.PHONY: test lint bench demo gpu

test:   ; $(PYTHON) -m pytest
lint:   ; $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy
bench:  ; $(PYTHON) -m pytest bench/ --benchmark-only && $(PYTHON) -m bench.report
demo:   ; $(PYTHON) -m timefast.train --backbone timesformer
gpu:    ; TIMEFAST_EXPECT_GPU=1 $(PYTHON) -m pytest -m "not slow or gpu"
