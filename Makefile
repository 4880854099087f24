# Two commands do all on a fresh machine with Python 3.11 or later: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BENCH ?= --benchmark
BIN := $(VENV)/bin
EXTRAS := faces,report,train,dev
SETTINGS := --identities 60 --frames 40

.PHONY: demo test lint bench demonstration clean

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

# synthesise, train tiny, score the held-out identities, write the report
demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/sdr synth $(DEMO)/data --crf '[23]'
	$(BIN)/sdr train --data $(DEMO)/data --out $(DEMO)/model $(TRAIN)
	$(BIN)/sdr score $(DEMO)/data --truth $(DEMO)/data/videos.csv --split test \
		--weights $(DEMO)/model/model.safetensors --out $(DEMO)/report

test: $(VENV)/installed
	$(BIN)/pytest -n 2 -p no:benchmark

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed
	$(BIN)/pytest bench $(BENCH)

clean:
	rm -rf $(VENV) $(DEMO) sdr_scores build *.egg-info
