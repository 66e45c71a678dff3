#!/usr/bin/env bash
# On a machine with a CUDA GPU: the GPU tests of projections, then every measurement of them that a bar speaks of. Each part
# has its own time, so that a slow compilation costs its own figures only.
# usage: bash benchmarks/gpu_projection.sh [OUTPUT_FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"
timeout 150 pytest -q -m "gpu and not slow" tests/ops/test_grad_project.py tests/ops/test_cross_entropy.py tests/projection \
  -p no:cacheprovider --timeout=120 > "$out/projection-tests.txt" 2>&1
status=$?
tail -5 "$out/projection-tests.txt"
measure() {
  timeout "$1" python3 -P -m sparseopt.benchmarks.projection "${@:2}" --output "$out" 2> "$out/projection.log" | grep -E '"(met|measured)"|error' ||
    { status=1; tail -5 "$out/projection.log"; }
}
measure 90 --shape gpt2 --batch 16 --seq 1024 --mode eager compiled
measure 120 --shape gpt2 --batch 2 --seq 1024 --mode compiled graph --arms plain sparseopt
measure 150 --shape llama-3.2-1b --batch 8 --seq 1024 --mode eager compiled
exit "$status"
