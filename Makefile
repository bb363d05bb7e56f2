# `make demo` and `make test` set everything up by themselves in .venv; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := bdtool export engines calibration tests benchmarks
CREATED := $(VENV)/.stamp-created
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
FREEZE := $(VENV)-constraints
OLDEST := $(VENV)-oldest

# $(call pytest,BIN): run all tests by the Python there, in a process for each processor, as far as memory goes: each
# comes to 2.5 GB. Threads that wait sleep, as spinning would take the processor from another process.
pytest = OMP_WAIT_POLICY=PASSIVE $(1)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# $(call timed,NAME,COMMAND): run COMMAND, then say how long it took
timed = @start=$$(date +%s); echo "$(1) ..."; $(2) && echo "$(1): done in $$(( $$(date +%s) - start )) s"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-oldest lint format bench constraints clean

help:
	@echo "make demo         the whole pipeline on the shipped network, ending with a latency table"
	@echo "make test         lint, types, spelling and tests"
	@echo "make test-oldest  tests with the oldest packages that pyproject.toml allows, in an environment of their own"
	@echo "make lint         ruff, mypy and codespell only"
	@echo "make format       let ruff rewrite the code"
	@echo "make bench        the latency benchmark; its figures go to bench-output/"
	@echo "make constraints  write constraints.txt anew from the newest versions allowed"
	@echo "make clean        remove .venv, caches and build leftovers"
	@echo "Another interpreter: make test PYTHON=python3.12"

demo: $(VENV)/.stamp-demo
	@$(BIN)/bdtool demo

test: lint $(VENV)/triton
	@$(call pytest,$(BIN))

# what it lists is read from pyproject.toml, so that a bound cannot be older than what was tested
test-oldest:
	@rm -rf $(OLDEST)
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -c 'import re, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	    listed = (*project["dependencies"], *project["optional-dependencies"]["report"]); \
	    print(*(re.sub(">=([^,]+).*", r"==\1", one) for one in listed), sep="\n")' > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e '.[dev,demo]'
	@$(call pytest,$(OLDEST)/bin)

lint: $(VENV)/.stamp-dev
	$(call timed,ruff,$(BIN)/ruff check --quiet $(SOURCES) && $(BIN)/ruff format --check --quiet $(SOURCES))
	$(call timed,mypy,$(BIN)/mypy --no-error-summary)
	$(call timed,codespell,$(BIN)/codespell $(SOURCES) *.md docs pyproject.toml Makefile)

format: $(VENV)/.stamp-dev
	@$(BIN)/ruff check --fix --quiet $(SOURCES)
	@$(BIN)/ruff format --quiet $(SOURCES)

bench: $(VENV)/.stamp-demo
	@mkdir -p bench-output
	@$(BIN)/python benchmarks/latency.py --out bench-output/latency.json

# setuptools first, from the constraints, and no build isolation: an isolated build would fetch an untested version
$(VENV)/.stamp-%: $(CREATED) pyproject.toml constraints.txt
	$(call timed,set-up of $(VENV) with bdtool[$*] (some minutes the first time),$(INSTALL) setuptools && $(INSTALL) --no-build-isolation -e '.[$*]')
	@touch $@

$(CREATED):
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else "bdtool needs Python 3.11 or newer, and $(PYTHON) is %s. Name another one: make PYTHON=python3.12" % v)'
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot create $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

# NVIDIA's Triton, which tests start as a server: from a wheel that wants an older numpy, so apart and by itself
$(VENV)/triton: | $(CREATED)
	@rm -rf $@.part
	@$(INSTALL) --no-deps --target $@.part nvidia-pytriton==0.7.0 && mv $@.part $@ || \
	    echo "Triton cannot be installed here; tests that start it skip"

constraints:
	@rm -rf $(FREEZE)
	@$(PYTHON) -m venv $(FREEZE)
	@$(FREEZE)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,demo]'
	@{ sed -n '/^#/p' constraints.txt; \
	   $(FREEZE)/bin/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | LC_ALL=C sort -f; } > $(FREEZE)/new.txt
	@mv $(FREEZE)/new.txt constraints.txt
	@rm -rf $(FREEZE)

clean:
	@rm -rf $(VENV) $(FREEZE) $(OLDEST) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis bench-output demo-output
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
