# make demo    reproduce the paper's key-value arithmetic      make fix      format and mend
# make test    the fast tests                                  make check    format, lint, types
# make test-slow   the rest                                    make test-oldest   oldest versions
# make bench   measure time and memory against floor and LoRA (QUICK=1: 3 minutes)
# make browser   install Chromium, in which make test-slow tries the playground
# make docs    build site/ from docs/, warnings are errors       make notebooks  run them in full
# make models  fetch small pretrained models (CODER=1: a code model too), for examples and tests

PYTHON ?= python3
BIN := .venv/bin
# One thread a process: the tests run in parallel, and tiny models gain nothing from more.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo bench models browser docs notebooks test test-slow test-oldest check fix lock clean

demo: $(BIN)/.installed
	$(BIN)/graftlm reproduce kv-arithmetic --systems augmenting anchor composed wrong-test

bench: $(BIN)/.installed
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks $(if $(QUICK),--quick)

models: $(BIN)/.installed
	$(BIN)/python -m graftlm.reproduce.real_models $(if $(CODER),--coder)

browser:
	command -v chromium || { apt-get update && apt-get install -y --no-install-recommends chromium; }

# The variable silences a notice of mkdocs-material about its own future.
docs: $(BIN)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(BIN)/.installed
	$(BIN)/python notebooks/execute.py

test: $(BIN)/.installed
	$(TEST_ENV) $(BIN)/pytest -n auto --maxprocesses 8

test-slow: $(BIN)/.installed
	$(TEST_ENV) $(BIN)/pytest -n auto --maxprocesses 8 --dist loadgroup -m slow

check: $(BIN)/.installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyrefly check

fix: $(BIN)/.installed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "graftlm needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	touch $@

# The oldest versions pyproject.toml allows, in an environment of their own.
test-oldest: .venv-oldest/.installed
	$(TEST_ENV) .venv-oldest/bin/pytest -n auto --maxprocesses 8

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . --group dev
	touch $@

lock: $(BIN)/.installed
	{ echo "# Every package that make installs, pinned exactly. make lock writes this file."; \
	  $(BIN)/python -m pip freeze --all --exclude-editable | sed 's/+[a-z0-9]*$$//' | sort -f; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache .hypothesis
