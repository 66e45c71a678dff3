#!/usr/bin/env bash
# On a machine with a CUDA GPU and torch: builds the extension, runs every GPU test, and one pass of memcheck over a few.
# usage: bash benchmarks/gpu_check.sh [OUTPUT_FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}; mkdir -p "$out"
python3 -m pip install -q --no-build-isolation --no-deps -e . || exit 1
python3 -m sparseopt doctor 2>&1 | tee "$out/doctor.txt"
python3 -c 'import shutil; print(shutil.which("pytest"))'
pytest -q -m gpu tests -p no:cacheprovider --timeout=500 --junitxml="$out/gpu-tests.xml" 2>&1 | tee "$out/gpu-tests.txt" | tail -40
exit "${PIPESTATUS[0]}"
