#!/usr/bin/env bash
# All that needs an NVIDIA GPU: the tests of `pytest -m gpu`, then short trainings in several
# precisions, compiled and not, as one table for benchmarks/README.md. Not run yet on a GPU.
#
#   benchmarks/gpu.sh                   with .venv/bin/python
#   PYTHON=python benchmarks/gpu.sh     with another environment that has the package's dependencies
#
# It downloads nothing: text comes from the embedded grammar, and from tinyshakespeare where
# TX_LIGHTNING_DATA has it. Exits with 1 if a test or a training failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "benchmarks/gpu.sh: torch sees no NVIDIA GPU" >&2; exit 1; }
status=0
"$python" -m pytest -m gpu --quiet -p no:cacheprovider tests/test_gpu.py || status=1
"$python" benchmarks/gpu.py "$@" || status=1
exit "$status"
