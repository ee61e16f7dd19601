# dvirl: one environment, and the commands that use it. `make help` lists them.
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
BOOK    := $(VENV)/.book
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
STAMP   := $(shell date +%Y%m%d-%H%M%S)
RUN     ?= runs/train-$(STAMP)
PYTHON  ?= $(shell for p in python3.11 python3 python; do \
             $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && command -v $$p && break; done)
RECORD  := DVIRL_RESULTS=book/results DVIRL_COMMAND="make $(MAKECMDGOALS)"
STUDIES := $(patsubst configs/%.yaml,%,$(sort $(wildcard configs/study-*.yaml)))
QUICK   ?= runs/quick
SET     ?= threads=1
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup train test test-quick faults fuzz soak evaluate bench experiments-quick check-notebooks lint lab shell \
        notebooks book book-page book-pdf check-book check-links check-engines bench-peers clean $(STUDIES)

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make the environment in .venv and fetch the default model

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "dvirl needs Python 3.11 and found none; install it or say make PYTHON=/path/to/python3.11"; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "dvirl needs Python 3.11; $(PYTHON) is another version or is missing"; exit 2; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/dvirl fetch
	@touch $(READY)

train: $(READY)  ## run notebooks/03_train.ipynb on its defaults: a draft learns from nothing until it pays
	@mkdir -p $(RUN)
	@$(BIN)/python -m dvirl.experiments.execute notebooks/03_train.ipynb $(RUN)/03_train.ipynb run_dir=$(RUN)
	@echo "executed notebook: $(RUN)/03_train.ipynb"
	@echo "log:               $(RUN)/metrics.jsonl"
	@echo "figure:            $(RUN)/learning_curve.png"
	@echo "checkpoint:        $$(ls -d $(RUN)/checkpoints/step-* | tail -n 1)"

# Threads that wait for one another sleep: spinning takes the core from whatever runs beside them.
test test-quick check-notebooks experiments-quick: export OMP_WAIT_POLICY = passive

test: $(READY)  ## the whole test suite with coverage, lint, the notebooks against their outputs, a row of every study
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -n 2 --dist worksteal --cov --cov-report=term --cov-fail-under=95
	$(MAKE) --no-print-directory -j 2 lint check-notebooks $(STUDIES) QUICK=runs/test \
	  SET="threads=1 num_prompts=16 held_out=8 max_new_tokens=16" ROWS="--minutes 0.1"

check-notebooks: $(READY)  ## execute the notebooks and compare what they say with their outputs
	$(BIN)/pytest --nbval --nbval-sanitize-with nbval.cfg notebooks -n 2 --dist loadfile

experiments-quick: $(READY)  ## run the laptop-size version of every study in configs/, a minute or so each, two at a time
	$(MAKE) --no-print-directory -j 2 $(STUDIES)

$(STUDIES): $(READY)
	OMP_NUM_THREADS=1 $(BIN)/dvirl study configs/$@.yaml --quick --set $(SET) $(ROWS) --out $(QUICK)/$@.json

bench: $(READY)  ## time every way of decoding side by side (QUESTIONS="a.jsonl b.jsonl" for others than the drafter's own)
	$(BIN)/dvirl bench $(if $(QUESTIONS),--questions $(QUESTIONS)) --out runs/bench-$(STAMP).json

evaluate: $(READY)  ## judge the default drafter by Spec-Bench's measures, on the packaged questions, all methods in turn
	$(BIN)/dvirl evaluate --answer_tokens 32 --run_dir runs/evaluate-$(STAMP)

test-quick: $(READY)  ## the tests that need no real model
	$(BIN)/pytest tests -n 2 --dist worksteal -m 'not real'

faults: $(READY)  ## kill a run at 120 places and see that, resumed, it is the run that was never killed
	$(RECORD) DVIRL_FAULTS=120 $(BIN)/pytest tests/test_resume.py -n 2 --dist worksteal

soak: $(READY)  ## 2,000 updates in which memory, file handles and step time stay flat, and what bigger settings cost
	$(RECORD) DVIRL_SOAK=2000 OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_soak.py

fuzz: $(READY)  ## give every reader 12,000 broken files, and decode with 200 random models in every way; others each time
	DVIRL_FUZZ=12000 DVIRL_RANDOM_MODELS=200 DVIRL_RANDOM_FIRST=$$(date +%s) OMP_NUM_THREADS=1 \
	  $(BIN)/pytest tests/test_fuzz.py tests/test_random_models.py -n 2 --dist worksteal

lint: $(READY)  ## ruff, mypy --strict and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

notebooks: $(READY)  ## execute the committed notebooks anew, in place
	for n in notebooks/*.ipynb; do $(BIN)/papermill $$n $$n --kernel python3 || exit 1; done

$(BOOK): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,book]'
	@touch $(BOOK)

book: $(BOOK)  ## build the book from the committed outputs into _build/html; a warning is an error
	rm -rf _build/html
	$(BIN)/jupyter-book build . --all --toc _toc.yml --config book/_config.yml --path-output . -W -n --keep-going

book-page: $(BOOK)  ## the same as one page, _build/singlehtml/index.html
	rm -rf _build/singlehtml
	$(BIN)/jupyter-book build . --all --builder singlehtml --toc _toc.yml --config book/_config.yml --path-output . -W -n --keep-going
	sed -e 's|href="book/intro.html#|href="#|g' -e '/src="searchindex.js"/d' _build/singlehtml/book/intro.html > _build/singlehtml/index.html
	rm -r _build/singlehtml/book

check-book:  ## build all three and open every page in a headless Chromium; screenshots in _build/screenshots
	@test -x "$(CHROMIUM)" || { echo "make $@ needs Chromium; apt-get install chromium, or CHROMIUM=/path/to/it"; exit 2; }
	$(MAKE) --no-print-directory book book-pdf
	rm -rf _build/screenshots
	CHROMIUM="$(CHROMIUM)" $(BIN)/pytest tests_browser -n 2 --dist worksteal

book-pdf:  ## the same as PDF, _build/dvirl.pdf, by Chromium
	@test -x "$(CHROMIUM)" || { echo "make $@ needs Chromium; apt-get install chromium, or CHROMIUM=/path/to/it"; exit 2; }
	$(MAKE) --no-print-directory book-page
	CHROMIUM="$(CHROMIUM)" $(BIN)/python tests_browser/chromium.py _build/singlehtml _build/dvirl.pdf

check-links: $(BOOK)  ## ask every address outside that the book names; needs the internet
	$(BIN)/jupyter-book build . --all --builder linkcheck --toc _toc.yml --config book/_config.yml --path-output .

check-engines: $(READY)  ## serve the drafter in the box with transformers, llama.cpp and vLLM, each in an environment of its own
	$(BIN)/python tests_engines/check.py --out book/results/engines-cpu.json

bench-peers: $(READY)  ## time ours beside the newest transformers, economize and flashspec (QUESTIONS="a.jsonl b.jsonl" for other questions)
	$(BIN)/python tests_engines/peers.py $(if $(QUESTIONS),--questions $(QUESTIONS) --out runs/peers-$(STAMP).json,--out book/results/peers-cpu.json)

lab: $(READY)  ## open JupyterLab in the environment (LAB_ARGS="--no-browser --port 8888" for other options)
	$(BIN)/jupyter lab notebooks $(LAB_ARGS)

shell: $(READY)  ## a shell with the environment active
	@PATH="$(CURDIR)/$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/$(VENV)" $${SHELL:-bash}

clean:  ## remove the environment and what tools cache; runs stay
	rm -rf $(VENV) .engines .peers _build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build *.egg-info
