# make serve    everything, from nothing to a first answer      MODEL_PATH=… PORT=… HOST=… make serve
# make test     every test, those on real Triton too
# make test-compose  the deployment on a real Docker engine: builds the images, brings them up, breaks them
# make test-chaos   faults under load, and hostile clients beside innocent ones: nothing lost, nothing wrong, nothing leaked
# make soak     mixed traffic at one and a half times the capacity, ten minutes
# make fuzz     20,000 mutated requests, 20,000 mutated pictures, schemathesis       each of the three: ARGS=--short, ARGS=--write
# make mutants  would the tests notice a fault? breaks a line at a time     ARGS=--short, ARGS='--only service/decoder/kv_blocks.py'
# make bench    the service beside its peers, and its parts beside their bounds     ARGS=--short, --growth, --figures, --write
# make check    what CI checks: format, lint, types, layers
# make kernel   what the attention kernel takes of GPUs that need not be here: registers, spills, shared memory
# make gpu-check    on a machine with a GPU: is the kernel right, how near to the bandwidth   PYTHON=… ARGS=--tiles
# make clean    removes what these made, the virtual environment included

PYTHON ?= python3
VENV := .venv
TRITON := .triton/pytriton/tritonserver/bin/tritonserver
TRITON_WHEEL := nvidia-pytriton==0.7.0

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# pip install $(PACKAGES): one line for each package; its whole output only where it fails.
define install
mkdir -p .cache
$(VENV)/bin/pip --disable-pip-version-check install $(PACKAGES) 2>&1 | tee .cache/install.log \
	| sed -nu -e 's/^Collecting \([^ ]*\).*/    \1/p' -e 's/^Building wheels.*/    building/p' -e 's/^Installing collected.*/    installing/p' \
	|| { tail -n 20 .cache/install.log >&2; echo 'crossgate: installing failed; the whole log is .cache/install.log' >&2; exit 1; }
endef

.PHONY: serve test test-compose test-chaos soak fuzz bench mutants check kernel gpu-check clean install install-dev
.SILENT:

serve: install
	exec $(VENV)/bin/python -m service.launch

test: install-dev
	$(VENV)/bin/python -m pytest $(ARGS)

test-compose: install-dev
	$(VENV)/bin/python -m pytest tests/compose -m compose -o timeout=3600 $(ARGS)

test-chaos: install-dev
	$(VENV)/bin/python -m tests.reliability.chaos $(ARGS)
	$(VENV)/bin/python -m tests.reliability.neighbours $(ARGS)

soak: install-dev
	$(VENV)/bin/python -m tests.reliability.soak $(ARGS)

fuzz: install-dev
	$(VENV)/bin/python -m tests.reliability.fuzz $(ARGS)

mutants: install-dev
	$(VENV)/bin/python -m tests.mutants $(ARGS)

bench: $(VENV)/.bench
	$(VENV)/bin/python -m loadtest.bench $(ARGS)

check: install-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/hadolint Dockerfile tests/compose/standins/Dockerfile
	$(VENV)/bin/python -m tests.compose.check
	if command -v promtool >/dev/null; then
		promtool check config deploy/prometheus/prometheus.yml
		promtool check rules deploy/prometheus/rules.yml deploy/prometheus/alerts.yml
		promtool test rules deploy/prometheus/tests.yml
	else
		echo 'crossgate: promtool is not installed (Debian: prometheus); its checks are left out' >&2
	fi
	$(VENV)/bin/python -m pytest -q tests/deploy/test_kubernetes.py

kernel: install-dev
	$(VENV)/bin/python -m tests.decoder.kernel_resources

# With the machine's own Python and packages: nothing is installed, there may be no network.
gpu-check:
	$(PYTHON) -m tests.gpu.check $(ARGS)

clean:
	rm -rf $(VENV) .triton .cache *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(VENV)/.serve $(TRITON)
install-dev: $(VENV)/.dev $(TRITON)

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit("crossgate: needs Python 3.11 or later, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	echo '» virtual environment'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.serve: PACKAGES = -e '.[gateway,stages,demo]'
$(VENV)/.serve: $(VENV)/.made pyproject.toml
	echo '» Python packages (once)'
	$(install)
	touch $@

$(VENV)/.dev: PACKAGES = -e '.[gateway,stages,demo,otel,dev]'
$(VENV)/.dev: $(VENV)/.serve
	echo '» packages for tests and checks (once)'
	$(install)
	touch $@

$(VENV)/.bench: PACKAGES = -e '.[gateway,stages,demo,otel,dev,bench]'
$(VENV)/.bench: $(VENV)/.dev $(TRITON)
	echo '» packages for the benchmark (once)'
	$(install)
	touch $@

# Its metadata asks for numpy<2 and more that the server does not need: into its own folder, without dependencies.
$(TRITON): PACKAGES = --no-deps --target .triton $(TRITON_WHEEL)
$(TRITON): | $(VENV)/.made
	echo '» Triton Inference Server (once)'
	rm -rf .triton
	$(install)
	touch $@
