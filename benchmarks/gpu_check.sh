#!/usr/bin/env bash
# On a machine with a CUDA GPU and torch: builds the extension, runs every GPU test, memcheck over a few, the benchmarks of
# the optimizer and of masks. SPARSEOPT_COMMIT names the commit where the tree came without its history.
# usage: bash benchmarks/gpu_check.sh [OUTPUT_FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"
python3 -m pip install -q --no-build-isolation --no-deps -e . || exit 1
python3 -P -m sparseopt doctor 2>&1 | tee "$out/doctor.txt"
# Test files whose packages a machine lacks cannot be collected; the GPU tests need torch and triton only.
pytest -q -m gpu tests/ops tests/optim/test_gpu.py tests/deltas tests/masks tests/projection tests/test_semi_structured.py tests/test_topk_attention.py -p no:cacheprovider --timeout=500 --junitxml="$out/gpu-tests.xml" > "$out/gpu-tests.txt" 2>&1
status=$?
tail -5 "$out/gpu-tests.txt"
if [ "$status" -eq 0 ]; then # no speed without the grid
  python3 -P -m sparseopt.benchmarks.gpu_optimizer "$out" || status=1
  python3 -P -m sparseopt.benchmarks.gpu_masks "$out" || status=1
fi
if command -v compute-sanitizer > /dev/null; then
  timeout 240 compute-sanitizer --tool memcheck --error-exitcode 9 --log-file "$out/memcheck.txt" \
    python3 -m pytest -q -m gpu tests/ops tests/optim/test_gpu.py -p no:cacheprovider -k "cuda and 1025 and not compile" 2>&1 | tail -3
  echo "memcheck: exit ${PIPESTATUS[0]}"
  tail -2 "$out/memcheck.txt"
fi
exit "$status"
