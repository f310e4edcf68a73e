# make install   .venv with everything; make train and make test do it first
# make train     the default run: six bundled domains, a few minutes on two cores
# make test      the tests; make test-all adds those marked slow
# make lint      ruff, with the rules of pyproject.toml
# make soak      runs that are killed and damaged and must come to the same end, for MINUTES=10
# make audit     known vulnerabilities of what is installed, where the database of them can be reached
PYTHON ?= python3
MINUTES ?= 10
BIN := .venv/bin
INSTALLED := .venv/.installed
# As in the commands (lifealign/environment.py): threads that wait must not spin for long on shared cores.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 10000
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install train test test-all soak audit lint clean

install: $(INSTALLED)

# torch first and alone, under the constraints: a later package must find it there and not bring a second one.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: install
	$(BIN)/deepspeed launch/train.py +sequence=six_domains

# Two processes of tests, each with a thread: two threads in each get in each other's way and take twice the time.
test: export OMP_NUM_THREADS := 1
test: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-all: install
	$(BIN)/python -m pytest

soak: install
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

audit: install
	$(BIN)/python .ci/audit.py

clean:
	rm -rf .venv build *.egg-info
