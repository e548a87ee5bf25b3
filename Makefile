# `make demo` and `make test` each set everything up on a machine that has only Python, make and a compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
REAL_MODEL ?= $(or $(ROPE_SCALING_REAL_MODEL),HuggingFaceTB/SmolLM2-135M-Instruct)
REAL_DOCUMENTS ?= 4
REAL_DOCUMENTS_32K ?= 2
REAL_MODEL_IS = --model $(REAL_MODEL) --model-name HuggingFaceTB/SmolLM2-135M-Instruct
REAL = $(REAL_MODEL_IS) --data python-reference --pieces
REAL_METHODS_CODE = $(addprefix --method ,angle_clip angle_clip:saturation_length=8192 rerope self_extend)
REAL_METHODS = $(addprefix --method ,angle_clip self_extend rerope dual_chunk dynamic_yarn string lm_infinite \
	sliding_window sliding_window:num_sinks=4 linear ntk yarn mrrope_pro rerope+log_n self_extend+log_n angle_clip+log_n \
	dual_chunk+log_n)
REAL_TASKS = --task perplexity --task niah_multikey:trials=2 --task context_gain \
	$(addprefix --method ,self_extend angle_clip ntk dual_chunk rerope dynamic_yarn linear)
REAL_TASKS_32K = --task niah_multikey:trials=1 --task perplexity --task context_gain \
	$(addprefix --method ,self_extend angle_clip+log_n rerope+log_n dual_chunk lm_infinite)
REAL_METHODS_32K = $(addprefix --method ,angle_clip self_extend rerope dual_chunk yarn angle_clip+log_n rerope+log_n \
	lm_infinite sliding_window sliding_window:num_sinks=4 dynamic_yarn ntk self_extend+log_n dual_chunk+log_n \
	mrrope_pro linear string)
DEMO_METHODS = $(addprefix --method ,linear ntk yarn mrrope_pro llama3 dynamic_yarn sliding_window lm_infinite rerope \
	self_extend:group_size=16 dual_chunk angle_clip)
DEMO_DOCUMENTS ?= 8
DEMO_TRIALS ?= 2
CONSTRAINTS ?= constraints.txt
OLDEST_TRANSFORMERS = $(VENV)/oldest-transformers
HOST_TESTS = tests/hf tests/attention --ignore=tests/hf/test_sharded.py --ignore=tests/hf/test_gguf.py
TWO_AT_ONCE = -n 2 --dist worksteal
RECIPES = $(basename $(notdir $(wildcard recipes/demo_*.yaml)))
SETUP := pyproject.toml $(CONSTRAINTS)
INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS)

GPU_PYTHON ?= python3

.PHONY: demo sweep tasks test slow host oldest newest lint bench gpu real ecosystem llama-cpp families recipes smoke clean

demo: $(VENV)/.eval ## the embedded model, unpatched and under a dozen methods, at 1x to 8x: loss and look-ups, in a few minutes
	$(BIN)/rope-scaling evaluate --model demo --task perplexity --task kv_retrieval:trials=$(DEMO_TRIALS) \
		--max-documents $(DEMO_DOCUMENTS) $(DEMO_METHODS) --output runs/demo
	$(BIN)/rope-scaling report runs/demo
	@echo "Every method, on all documents: make sweep (many times as long)."

sweep: $(VENV)/.eval ## the embedded model under every method, on all documents
	$(BIN)/rope-scaling evaluate --model demo --task perplexity --task kv_retrieval --output runs/sweep
	$(BIN)/rope-scaling report runs/sweep

tasks: sweep ## what else the table of the embedded model holds: copies, context gain, key tokens
	$(BIN)/rope-scaling evaluate --model demo --task context_gain --task key_tokens --task copy --output runs/sweep
	$(BIN)/rope-scaling report runs/sweep

test: $(VENV)/.dev ## run the tests; those that need a GPU or a real model skip and say so
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_AT_ONCE) -m "not slow"

slow: $(VENV)/.dev ## the tests that `make test` leaves out for their time
	$(BIN)/python -m pytest -m slow

host: $(OLDEST_TRANSFORMERS)/.done ## the tests of what meets Transformers, on the oldest supported one
	PYTHONPATH=$(OLDEST_TRANSFORMERS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_AT_ONCE) -m "not slow" -k "not compile" $(HOST_TESTS)

oldest: ## the same tests on the oldest supported torch and Transformers
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

newest: .constraints-newest.txt ## the same tests on the newest Transformers there is
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=.constraints-newest.txt

lint: $(VENV)/.dev ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev ## every benchmark; each prints ratios measured side by side
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/retrieval.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/decode.py --streaming
	$(BIN)/python benchmarks/levers.py
	$(BIN)/python benchmarks/loss.py

gpu: ## on a machine with a CUDA card, in its own Python (GPU_PYTHON): the engine beside stock attention, and its tests
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py

real: $(VENV)/.dev ## the real model's tables at 16k and 32k tokens, and the planted codes: four to eight hours on two cores
	$(BIN)/rope-scaling evaluate $(REAL) --max-documents $(REAL_DOCUMENTS) --lengths 1x,2x \
		$(REAL_METHODS) --output runs/smollm2-135m
	$(BIN)/rope-scaling evaluate $(REAL_MODEL_IS) --data stdlib --max-documents $(REAL_DOCUMENTS) --lengths 1x,2x \
		$(REAL_METHODS_CODE) --output runs/smollm2-135m-stdlib
	$(BIN)/rope-scaling evaluate $(REAL) --max-documents 2 --lengths 1x,2x $(REAL_TASKS) \
		--output runs/smollm2-135m-tasks
	$(BIN)/rope-scaling evaluate $(REAL) --max-documents $(REAL_DOCUMENTS_32K) --lengths 1x,2x,4x \
		--task perplexity --task repeats $(REAL_METHODS_32K) --output runs/smollm2-135m-32k
	$(BIN)/rope-scaling evaluate $(REAL) --max-documents 2 --lengths 1x,2x,4x $(REAL_TASKS_32K) \
		--output runs/smollm2-135m-32k-tasks
	ROPE_SCALING_REAL_MODEL=$(REAL_MODEL) $(BIN)/python benchmarks/codes.py
	ROPE_SCALING_REAL_MODEL=$(REAL_MODEL) $(BIN)/python -m pytest -m real_model

ecosystem: $(VENV)/.dev ## the same in quantized weights, TRL, pipelines, `transformers serve`
	$(INSTALL) -e ".[ecosystem]"
	$(BIN)/python -m pytest tests/hf/test_ecosystem.py

llama-cpp: $(VENV)/.dev ## exported GGUF files in llama.cpp itself, which is built from source: twenty minutes on two cores
	$(INSTALL) llama-cpp-python
	ROPE_SCALING_REAL_MODEL=$(ROPE_SCALING_REAL_MODEL) $(BIN)/python -m pytest -m llama_cpp -rPs

families: $(VENV)/.dev ## try every family of the installed Transformers, and write docs/families.md
	$(BIN)/python tests/families.py

recipes: $(VENV)/.dev ## fine-tune the embedded model by every demo recipe, and tabulate: 40 minutes on two cores
	for recipe in $(RECIPES); do $(BIN)/rope-scaling finetune $$recipe --output-dir runs/recipes/$$recipe || exit 1; done
	$(BIN)/python -m rope_scaling.recipes.report runs/recipes

smoke: $(VENV)/.dev ## the wheel, built and used from an empty folder
	$(BIN)/python -m pytest tests/test_packaging.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# Torch first and pinned, so that nothing else chooses another build of it.
$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools
	touch $@

.constraints-newest.txt: constraints.txt
	sed '/^transformers==/d;/^tokenizers==/d' constraints.txt > $@

# Beside the rest, not in its place: found first on the path, it takes seconds to set up.
$(OLDEST_TRANSFORMERS)/.done: $(VENV)/.dev .constraints-newest.txt constraints-oldest.txt
	rm -rf $(OLDEST_TRANSFORMERS)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c .constraints-newest.txt \
		--target $(OLDEST_TRANSFORMERS) "$$(grep '^transformers==' constraints-oldest.txt)"
	touch $@

$(VENV)/.eval: $(VENV)/.torch $(SETUP)
	$(INSTALL) --no-build-isolation -e ".[eval]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SETUP)
	$(INSTALL) --no-build-isolation -e ".[dev]"
	touch $@ $(VENV)/.eval
