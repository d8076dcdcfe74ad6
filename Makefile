# Each target works on a fresh machine with python3, g++ and make; a GPU and a CUDA toolkit are used where they are.
#   make demo    pretrain a small encoder on generated scenes, evaluate it, draw a film strip (8 minutes on 2 cores)
#   make test    lint, build, run the tests
#   make lint    ruff only
PYTHON ?= python3
TORCH ?= torch==2.11.0 torchvision==0.26.0
PY = .venv/bin/python

.PHONY: demo test lint clean always
.DELETE_ON_ERROR:

demo: build/done
	$(PY) demo.py

test: lint build/done
	$(PY) -m pytest

lint: .venv/done
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.venv/done: Makefile
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q $(TORCH) scikit-image tqdm pybind11 ninja setuptools ruff==0.17.6 pytest hypothesis
	touch $@

build/done: .venv/done setup.py $(wildcard csrc/*.* csrc/*/*) $(if $(wildcard r2o_C*.so),,always)
	$(PY) setup.py -q build_ext --inplace
	touch $@

clean:
	rm -rf build demo-out *.so
