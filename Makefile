# Two commands do all on a fresh machine with Python 3.11 or later: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BENCH ?= --benchmark
BIN := $(VENV)/bin
EXTRAS := faces,prepare,report,train,docs,dev
TRAIN := --preset tiny
SEED ?= $(shell date +%s)

# idle threads sleep: on a shared machine waiting in a loop can cost several times the work
export OMP_WAIT_POLICY ?= passive

.PHONY: demo control test soak faults lint audit bench report compare gpu docs clean

$(VENV)/installed: pyproject.toml constraints.txt setup.py CMakeLists.txt sdr_kernels/_csrc.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

# glibc gives every large tensor back to the system, which then clears the same pages again: 28 s of steps become
# 21 s without, on an Intel Xeon with one thread and torch 2.13
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000

define train_and_score
	rm -rf $(DEMO)/$(1)model
	$(KEEP_MEMORY) $(BIN)/sdr train --data $(DEMO)/clips --out $(DEMO)/$(1)model $(TRAIN) $(2)
	$(BIN)/sdr score $(DEMO)/data --truth $(DEMO)/data/videos.csv --split test \
		--weights $(DEMO)/$(1)model/model.safetensors --out $(DEMO)/$(1)report
endef

# synthesise, cut clips, train tiny, score the held-out identities, write the report
demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/sdr synth $(DEMO)/data --crf '[23]'
	$(BIN)/sdr prepare $(DEMO)/data --layout ffpp --out $(DEMO)/clips --size 64
	$(call train_and_score,)

# the same with temporal kernels of 1: must not tell real from fake
control: $(DEMO)/data
	$(call train_and_score,control_,--model.temporal_kernels false)

$(DEMO)/data:
	$(MAKE) demo

# with worksteal a worker has tests that are neighbours, so most modules' fixtures are made once
PYTEST := $(BIN)/pytest -n 2 --dist worksteal -p no:benchmark

# TEST='-k videos' chooses
test: TEST :=
test: $(VENV)/installed
	$(PYTEST) $(TEST)

# the promises at full length, over an hour on two cores, and the table of docs/promises.md; SOAK='-k videos', SEED=number
soak: $(VENV)/installed
	SDR_SEED=$(SEED) SDR_FILES=10000 SDR_CASES=1000 SDR_CHECKPOINTS=10000 SDR_KILLS=50 SDR_CLIPS=2000 \
		$(PYTEST) -m promise --promises tests/results/promises.json $(SOAK); \
		code=$$?; $(BIN)/python tests/promises.py && exit $$code

# mistakes planted in copies of this tree, each of which a test must catch; FAULTS='word ...' chooses
faults: $(VENV)/installed
	$(BIN)/python tests/plant_faults.py --out tests/results/planted_faults.json $(FAULTS); \
		code=$$?; $(BIN)/python tests/promises.py && exit $$code

audit: $(VENV)/installed
	$(BIN)/python .ci/audit

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed
	$(BIN)/pytest bench $(BENCH)

# README's measured tables, and every figure on one page, from bench/results; REPORT=--check leaves README as it is
report: $(VENV)/installed
	PYTHONPATH=. $(BIN)/python bench/report.py $(REPORT)

# is this tree slower than BASE, a commit or folder; COMPARE='-k EXPR --json FILE' and other options
compare: $(VENV)/installed
	@PYTHONPATH=. $(BIN)/python bench/compare_trees.py --base '$(BASE)' $(COMPARE)

# checks and times on this machine's GPU, under 10 minutes; installs nothing; OUT=folder and COMMIT=name are optional
gpu:
	@PYTHONPATH=. $(firstword $(wildcard $(BIN)/python) $(PYTHON)) bench/gpu.py $(if $(OUT),--out $(OUT)) $(if $(COMMIT),--commit $(COMMIT))

# the documentation site, into site/; a warning is an error
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(DEMO) sdr_scores site build *.egg-info
