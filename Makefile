# `make demo` and `make test` do everything on a fresh machine: Python 3.11 or newer, g++ and make.
PYTHON ?= python3
BIN := .venv/bin
# The CPU build of torch is pinned here; CUDA users install their own torch first and set CONSTRAINTS= to nothing.
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
PYTEST := $(BIN)/python -m pytest
# The record of the exhaustive proofs, and the formats that they are about.
PROOF := tests/exhaustive.md
PROVEN_FORMATS := e4m3fn e5m2 e2m1fn bf16 e8m3 fp16
# The record of those of the scales of OCP MX.
PROOF_OF_SCALES := tests/exhaustive_scales.md

.PHONY: demo quick test test-exhaustive prove prove-scales lint types docs benchmarks clean

# Threads that wait without spinning: beside other load, spinning makes every parallel region several times slower.
demo quick test test-exhaustive prove prove-scales: export OMP_WAIT_POLICY = passive

demo: .venv/ready
	$(BIN)/fpsim demo $(DEMO)

# Two processes of one thread each: most tests compile or compute small things, and threads would wait for each other.
quick test: export OMP_NUM_THREADS = 1
# Each process compiles its own kernels: a server of compiling processes imports torch once more for each of them.
quick test: export TORCHINDUCTOR_COMPILE_THREADS = 1
# Kernels without line tables for profilers: the same machine code, and a tenth less time for each.
quick test: export AOT_INDUCTOR_ENABLE_LINE_TABLES = 0
# Kernels linked by gold where it is installed: the same machine code, and a quarter less time for each. g++ runs the
# program called ld that it finds in this folder.
quick test: export COMPILER_PATH = $(CURDIR)/build/linker

# A few tests of each promise (tests/promises.py): one to three and a half minutes.
quick: .venv/ready build/linker/ld
	$(PYTEST) -n 2 -m "promise and not exhaustive"

# Everything but the slow proofs: 15 to 40 minutes on 2 cores with cold caches, most of it compilation.
test: .venv/ready build/linker/ld
	$(PYTEST) -n 2 --dist worksteal -m "not exhaustive" $(TESTS)
	$(BIN)/fpsim verify --all

# Every float32 input and whatever else takes minutes.
test-exhaustive: .venv/ready
	$(PYTEST) -m exhaustive --timeout 0 $(TESTS)

# Every float32 input in every rounding direction, eager and compiled: about half a minute per format and direction.
prove: .venv/ready
	$(BIN)/fpsim verify $(PROVEN_FORMATS:%=--format %) --rounding all --exhaustive --markdown $(PROOF)
	{ printf '`make prove` writes this file. It runs this command:\n\n'; cat $(PROOF); } > $(PROOF).new
	mv $(PROOF).new $(PROOF)

# The scales of every rule, for every format that takes them and every float32 magnitude: 84 pairs, 5 to 10 minutes.
# Eager code runs the same arithmetic (`fpsim.scaling.rules`) and takes a minute for each; the tests compare it around
# every step.
prove-scales: .venv/ready
	$(BIN)/fpsim verify --scale all --exhaustive --path compiled --markdown $(PROOF_OF_SCALES)
	{ printf '`make prove-scales` writes this file. It runs this command:\n\n'; cat $(PROOF_OF_SCALES); } > $(PROOF_OF_SCALES).new
	mv $(PROOF_OF_SCALES).new $(PROOF_OF_SCALES)

lint: .venv/ready build/site/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/site && ../../$(BIN)/lint-imports --no-logo --no-cache ../../pyproject.toml

types: .venv/ready build/site/ready
	cd build/site && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fpsim
	cd build/site && ../../$(BIN)/mypy --config-file ../../pyproject.toml ../../tests/policy/typed_caller.py

# The site, from docs/ and docstrings, in build/html. A link that leads nowhere is a warning, and a warning is an error.
docs: .venv/ready
	$(BIN)/python -m sphinx --builder html --fresh-env --fail-on-warning --keep-going --quiet docs build/html

# import-linter and mypy read the built wheel: the sources stand in four folders and become one package only there.
# A build starts from nothing, or setuptools would put files into the wheel that have been removed since.
build/site/ready: pyproject.toml $(shell find fpsim reference compile_backend paper -name __pycache__ -prune -o -print)
	rm -rf build/lib build/bdist.* build/wheel build/site
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/site build/wheel/*.whl
	touch $@

# The commands whose ratios depend on the vector width run with the machine's own vectors and with AVX2, and add rows to
# docs/speed.md. Plain Inductor's cache does not tell widths apart, so each width has its own.
RECORD := --record docs/speed.md
AVX2 := ATEN_CPU_CAPABILITY=avx2 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-avx2
OWN := TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-own

benchmarks: .venv/ready
	$(BIN)/python -m tests.benchmarks.rounding $(RECORD)
	$(BIN)/python -m tests.benchmarks.rounding --blocks --elements 16777216 $(RECORD)
	$(OWN) $(BIN)/python -m tests.benchmarks.training --peers $(RECORD)
	$(AVX2) $(BIN)/python -m tests.benchmarks.training --peers $(RECORD)
	$(OWN) $(BIN)/python -m tests.benchmarks.training --second $(RECORD)
	$(OWN) $(BIN)/python -m tests.benchmarks.optimizer $(RECORD)
	$(AVX2) $(BIN)/python -m tests.benchmarks.optimizer $(RECORD)
	$(OWN) $(BIN)/python -m tests.benchmarks.accumulators $(RECORD)
	$(AVX2) $(BIN)/python -m tests.benchmarks.accumulators $(RECORD)
	$(BIN)/python -m tests.benchmarks.rounding --peers
	$(BIN)/python -m tests.benchmarks.sharpness
	$(BIN)/python -m tests.benchmarks.curvature
	$(BIN)/python -m tests.benchmarks.profiling
	$(BIN)/python -m tests.benchmarks.study

build/linker/ld:
	mkdir -p $(@D)
	ln -sf "$$(command -v ld.gold || command -v ld)" $@

.venv/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev,docs,paper]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info runs
