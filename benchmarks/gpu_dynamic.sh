#!/usr/bin/env bash
# On a machine with a CUDA GPU: the GPU tests of masks that change, what a mask update costs, and what changing masks are worth
# on SmolLM2 (goes on where it was stopped, if its folder is still there). Each part has its own time.
# usage: bash benchmarks/gpu_dynamic.sh [OUTPUT_FOLDER] [SECONDS_OF_LEARNING] [MORE_ARGUMENTS_OF_LEARNING...]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu} seconds=${2:-420}
mkdir -p "$out"
python3 -P -c 'import sparseopt' 2> /dev/null || python3 -m pip install -q --no-build-isolation --no-deps -e . || exit 1
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
timeout 180 pytest -q -m "gpu and not slow" tests/ops/test_remap.py tests/ops/test_select.py tests/optim/dynamic tests/optim/test_gpu.py \
  -p no:cacheprovider --timeout=90 > "$out/dynamic-tests.txt" 2>&1
status=$?
tail -5 "$out/dynamic-tests.txt"
timeout 240 python3 -P -m sparseopt.benchmarks.dynamic_update --shape llama-3.2-1b --policies rigl set --output "$out/dynamic" || status=1
timeout --signal=INT "$((seconds + 60))" python3 -P -m sparseopt.benchmarks.dynamic_learning \
  --output "$out/dynamic" --time_limit "$seconds" "${@:3}" || status=$?
(cd "$out" && tar -czf dynamic.tar.gz dynamic dynamic-tests.txt)
exit "$status"
