PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.ready-demo
FUZZ := --cases 5000

.PHONY: demo test test-slow fuzz lint docs bench cubins gpu-test gpu-sanitizer gpu-bench gpu-proof clean

demo: $(or $(wildcard $(READY)),$(DEMO_READY))  ## train one network on real images with BPTT, SLTT and SLTT-K (DEMO=--quick)
	$(BIN)/sltt demo $(DEMO)

test: $(READY)  ## all the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: $(READY)  ## the slow tests: every example and configuration, from end to end
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m slow --durations=20

fuzz: $(READY)  ## random networks and options against an oracle, thousands of them (FUZZ="--cases 5000 --seed 0")
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --framework spikingjelly $(FUZZ)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --framework snntorch $(FUZZ)

lint: $(READY)  ## format, rules, types, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)  ## the committed measurements, again
	$(BIN)/python benchmarks/neuron.py
	$(BIN)/python benchmarks/through_time.py
	$(BIN)/python benchmarks/windows.py
	$(BIN)/python benchmarks/against_peers.py
	$(BIN)/python benchmarks/digits.py
	$(BIN)/python benchmarks/conversion.py
	$(BIN)/python benchmarks/trainer_overhead.py
	$(BIN)/python benchmarks/over_time.py
	$(BIN)/python benchmarks/tutorials.py
	$(BIN)/python benchmarks/similarity.py
	$(BIN)/python benchmarks/memory_tasks.py accuracy
	$(BIN)/python benchmarks/memory_tasks.py similarity
	$(BIN)/python benchmarks/accuracy.py digits
	$(BIN)/python benchmarks/accuracy.py event_digits
	$(BIN)/python benchmarks/accuracy.py cost
	$(BIN)/python benchmarks/readout.py
	$(BIN)/python benchmarks/write_tables.py

cubins: $(READY)  ## every variant of the CUDA kernels, compiled for every architecture (minutes, no GPU)
	SLTT_ALL_CUBINS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow" tests/kernels/test_nvrtc.py

gpu-test:  ## what needs a CUDA device, with the machine's own Python; installs nothing
	PYTHONPATH=. $(PYTHON) -m pytest -p no:cacheprovider -m "slow or not slow" tests/gpu

gpu-sanitizer:  ## the kernels' tests on the device under compute-sanitizer
	PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(PYTHON) -m pytest -p no:cacheprovider -m "slow or not slow" tests/gpu/test_kernels.py -k 'variant and cuda-nvrtc'

gpu-bench:  ## the fused neuron against copies and SpikingJelly on the device, with the machine's own Python
	PYTHONPATH=. $(PYTHON) benchmarks/neuron_kernel.py

gpu-proof:  ## all of it, and whole networks against the peers, in 9 minutes (GPU_WHEELS=FOLDER with what the machine's Python lacks)
	$(PYTHON) benchmarks/gpu_proof.py $(if $(GPU_WHEELS),--wheels $(GPU_WHEELS)) $(if $(GPU_OUTPUT),--output $(GPU_OUTPUT))

$(READY): EXTRA := dev
$(DEMO_READY): EXTRA := demo

$(READY) $(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed here (SpikingJelly 2.0 needs it): make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRA)]'
	touch $@

clean:
	rm -rf $(VENV) build dist site sltt-demo sltt-analysis
