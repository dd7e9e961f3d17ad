# make test         the tests
# make check        lint, format, types, import layers
# make docs         the site of docs/ and of the docstrings, in site/
# make notebooks    every notebook from its first cell to its last, at small sizes
# make quickstart   text -> pretrain -> grow -> pretrain -> grow -> fine-tune -> chat, then a real model grows, on one CPU
#
# The first run makes $(VENV) and installs into it; it needs python3 (3.11 to 3.13) and a package index, nothing else.
# An existing $(VENV) is used as it is and completed. Another Python: make test PYTHON=python3.13 VENV=.venv313

PYTHON ?= python3
VENV ?= .venv
# worksteal: tests of a module, which share what they made and compiled, mostly stay in one process.
PYTEST_FLAGS ?= -n 2 --dist worksteal
QUICKSTART_DIR ?= runs/quickstart/run
QUICKSTART_FLAGS ?=

EXTRAS := data,beam,clean,eval,select,mup,plots,notebooks,gguf,dev
PY := $(VENV)/bin/python
TELE := JAX_PLATFORMS=cpu $(VENV)/bin/tele
# Where configs/quickstart.py looks for them; QUICKSTART_DIR holds the run and nothing else.
TEXT := runs/quickstart/text
TOKENIZER := runs/quickstart/tokenizer.model

.PHONY: test check docs notebooks quickstart install

test: install
	$(PY) -m pytest $(PYTEST_FLAGS)

check: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright --pythonpath $(PY)
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

# --strict: a warning, such as a link to nothing or a page outside the navigation, is an error.
docs: install
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS),docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --clean

notebooks: install
	$(PY) -m pytest -n 2 --durations=0 tests/test_notebooks.py

quickstart: install
	$(TELE) data fetch quickstart --out $(TEXT)
	$(TELE) tokenizer train --preset tele_flm --vocab-size 4096 --out $(TOKENIZER) '$(TEXT)/*/train.jsonl'
	$(TELE) train --config configs/quickstart.py --workdir $(QUICKSTART_DIR) $(QUICKSTART_FLAGS)
	$(TELE) chat $(QUICKSTART_DIR) --tokenizer $(TOKENIZER) --prompt "画蛇添足是什么意思？"
	JAX_PLATFORMS=cpu $(PY) benchmarks/grow_a_real_model.py --dir runs/quickstart/real

# ---- installation ----------------------------------------------------------------------------------------------------

# One stamp for one state: setup.py, the extras, the Python version, and the directory (the `tele` of a copied $(VENV)
# runs the code of the checkout it was copied from). It is written last: an interrupted install is done again.
PYTHON_VERSION := $(shell { $(PY) -V || $(PYTHON) -V; } 2>/dev/null)
STATE := $(shell { cat setup.py; echo "$(EXTRAS) $(PYTHON_VERSION) $(CURDIR)"; } | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(STATE)

ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) -V 2>&1),$(PYTHON_VERSION))
$(error $(VENV) has $(PYTHON_VERSION), but PYTHON is $(shell $(PYTHON) -V 2>&1): set VENV to another directory)
endif
endif

SUPPORTED := import sys; v = sys.version_info; \
	sys.exit(None if (3, 11) <= v < (3, 14) else "tele_jax needs Python 3.11 to 3.13; PYTHON=... names another one")

install: $(STAMP)

$(STAMP):
	@$(PY) -c '' 2>/dev/null || { $(PYTHON) -c '$(SUPPORTED)' && \
		$(PYTHON) -m venv $$(test ! -e $(VENV)/pyvenv.cfg || echo --clear) $(VENV); }
	@$(PY) -c '$(SUPPORTED)'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@rm -f $(VENV)/.installed-*
	$(PY) -m pip install --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@
