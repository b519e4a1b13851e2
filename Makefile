# make reproduce   fresh machine to a table and a figure
# make test        fresh machine to the fast CPU suite
# make test-all    fast and slow suites; make lint types: ruff and pyright
SHELL := /bin/bash
.DELETE_ON_ERROR:
PY := .venv/bin/python
# A file's fixtures and compiled programs are made once: its tests stay in one process.
PYTEST := $(PY) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

# The newest interpreter of 3.11 to 3.13 that really works: it imports venv and builds one with pip inside.
# (A Debian python3 without python3-venv and a pyenv shim without a version both look fine until then.)
define find_python
found=; \
for exe in $$(for name in python3.13 python3.12 python3.11 python3; do type -aP $$name 2>/dev/null; done | while read -r exe; do \
    "$$exe" -c 'import sys, venv; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) and print(v[1], sys.argv[1])' "$$exe" 2>/dev/null; \
  done | sort -rn -s -k1,1 | cut -d' ' -f2-); do \
  rm -rf .venv; \
  if "$$exe" -m venv .venv >/dev/null 2>&1 && .venv/bin/python -m pip --version >/dev/null 2>&1; then found=$$exe; break; fi; \
done; \
if [ -z "$$found" ]; then rm -rf .venv; echo "error: no working Python 3.11, 3.12 or 3.13 with venv and pip on PATH" >&2; exit 1; fi; \
echo "using $$found ($$($$found --version 2>&1))"
endef

.PHONY: reproduce test test-slow test-all lint types lock clean

.venv/base: pyproject.toml requirements.lock
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then $(find_python); fi
	$(PY) -m pip install --quiet --disable-pip-version-check -c requirements.lock -e .
	@touch $@

.venv/test: .venv/base tests/kernels/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[test]'
	rm -rf .venv/kernels
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r tests/kernels/requirements.txt \
	  --target .venv/kernels
	@touch $@

reproduce: .venv/base
	$(PY) -m experiments data fetch
	$(PY) -m experiments run global-batch-lbl --preset cpu --out runs/global-batch-lbl-cpu

test: .venv/test
	$(PYTEST) -m 'not slow'

test-slow: .venv/test
	$(PYTEST) -m slow

test-all: test test-slow

lint: .venv/test
	$(PY) -m ruff check .
	$(PY) -m experiments report --check

types: .venv/test
	$(PY) -m pyright

# The lock is universal (one file for 3.11 to 3.13) and names no package index.
lock:
	uv pip compile --universal --no-header --no-annotate --python-version 3.11 --all-extras pyproject.toml -o requirements.lock

clean:
	rm -rf .venv .cache build *.egg-info
