# Each target works on a fresh machine with python3, g++ and make; a GPU and a CUDA toolkit are used if
# present. The first target that runs also installs everything into .venv, in 4 to 7 minutes.
#   make demo    pretrain a small encoder on generated scenes, evaluate it, draw a film strip (2 minutes on 2 cores)
#   make tour    write docs/method.md, its pictures and docs/method.ipynb again (5 minutes on 2 cores)
#   make test    lint, build, run the tests (8 minutes on 2 cores)
#   make bench   time every op, the mask step and the train step beside other ways to do them: 30 minutes on 2 cores
#                DEVICE=cuda: on a GPU; BENCH="--images photos --authors DIR": flags of bench/bench.py
#   make gpu     all that needs a GPU, in five stages of at most 7 minutes; needs PyTorch there, and no network
#                STAGE=3: one stage; GPU="--seconds 120 --authors DIR --data DIR --photos DIR": flags of bench/gpu.py
#   make emulate    run the CUDA kernels on a CPU, and check every access they make: 2 minutes on 2 cores; part of make test
#   make sanitize   the tests of the C++ ops under AddressSanitizer and UndefinedBehaviorSanitizer
#   make lint    ruff only
PYTHON ?= python3
TORCH ?= torch==2.11.0 torchvision==0.26.0
PY = .venv/bin/python
DEVICE ?= cpu

.PHONY: demo tour test bench gpu emulate sanitize lint clean always
.DELETE_ON_ERROR:

demo: build/done
	$(PY) demo.py

tour: build/done
	$(PY) -m jupytext --quiet --to ipynb docs/method.py
	$(PY) -m jupyter nbconvert --execute --to markdown --no-input --NbConvertApp.output_files_dir=method docs/method.ipynb
	sed -i 's/!\[png\](method\/\(\w*\)/![\1](method\/\1/' docs/method.md

test: lint build/done
	$(PY) -m pytest -n 2 --dist worksteal

bench: build/done .venv/peers-$(DEVICE)
	$(PY) bench/bench.py --device $(DEVICE) $(BENCH)

.venv/peers-$(DEVICE): .venv/done
	$(PY) -m pip install -q scikit-learn faiss-cpu fast-pytorch-kmeans psutil opencv-python-headless $(if $(filter cuda,$(DEVICE)),flash-kmeans)
	touch $@

gpu:
	$(or $(wildcard $(PY)),$(PYTHON)) bench/gpu.py $(if $(STAGE),--stage $(STAGE)) $(GPU)

emulate: build/done
	$(PY) -m pytest -n 2 tests/test_emulate.py

sanitize: .venv/done
	SANITIZE=1 $(PY) setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize-temp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(CURDIR)/build/sanitize:$(CURDIR) \
		.venv/bin/pytest -p no:cacheprovider tests/test_ops.py tests/test_kmeans.py tests/test_masks.py

lint: .venv/done
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.venv/done: Makefile
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q $(TORCH) scikit-image tqdm pybind11 ninja 'setuptools>=70.1,<82' ruff==0.17.6 pytest hypothesis tensorboard \
		pycocotools safetensors timm matplotlib pytest-xdist jupytext nbconvert ipykernel
	touch $@

build/done: .venv/done setup.py $(wildcard csrc/*.* csrc/*/*) $(if $(wildcard r2o_C*.so),,always)
	$(PY) setup.py -q build_ext --inplace
	touch $@

clean:
	rm -rf build demo-out *.so
