PYTHON ?= .venv/bin/python
TODAY := $(shell date +%F)

.PHONY: test lint bench demo gpu

test:   ; $(PYTHON) -m pytest
lint:   ; $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy
bench:  ; $(PYTHON) -m pytest bench/ --benchmark-only && $(PYTHON) -m bench.report
demo:   ; $(PYTHON) -m timefast.train --backbone timesformer
