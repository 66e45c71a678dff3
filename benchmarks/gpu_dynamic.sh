#!/usr/bin/env bash
# On a machine with a CUDA GPU: the GPU tests of masks that change, what a mask update costs, and what changing masks are worth
# on SmolLM2 (goes on where it was stopped, if its folder is still there), several runs at once, spread over the GPUs that are
# there: launching kernels takes a host longer than running them takes the GPU. Each part has its own time; PARTS="tests update
# learning" says which (all of them).
# usage: [PARTS=...] [JOBS=8] bash benchmarks/gpu_dynamic.sh [OUTPUT_FOLDER] [SECONDS_OF_LEARNING] [MORE_ARGUMENTS_OF_LEARNING...]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu} seconds=${2:-420}
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l)
gpus=$((gpus > 0 ? gpus : 1))
status=0
mkdir -p "$out"
python3 -P -c 'import sparseopt' 2> /dev/null || python3 -m pip install -q --no-build-isolation --no-deps -e . || exit 1
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
for part in ${PARTS:-tests update learning}; do
  case $part in
    tests)
      timeout 180 pytest -q -m "gpu and not slow" tests/ops/test_remap.py tests/ops/test_select.py tests/optim/dynamic \
        tests/optim/test_gpu.py -p no:cacheprovider --timeout=90 > "$out/dynamic-tests.txt" 2>&1 || status=1
      tail -5 "$out/dynamic-tests.txt"
      ;;
    update)
      timeout 240 python3 -P -m sparseopt.benchmarks.dynamic_update --shape llama-3.2-1b --output "$out/dynamic" || status=1
      ;;
    learning)
      jobs=()
      for job in $(seq "${JOBS:-8}"); do # they share the runs
        CUDA_VISIBLE_DEVICES=$((job % gpus)) OMP_NUM_THREADS=2 timeout --signal=INT "$((seconds + 60))" python3 -P -m sparseopt.benchmarks.dynamic_learning \
          --output "$out/dynamic" --no_picture --time_limit "$seconds" "${@:3}" > "$out/learning-$job.log" 2>&1 &
        jobs+=($!)
      done
      for job in "${jobs[@]}"; do wait "$job" || status=$?; done
      python3 -P -m sparseopt.benchmarks.dynamic_learning --output "$out/dynamic" --report || tail -3 "$out"/learning-1.log
      ;;
    *)
      echo "expected tests, update or learning, got $part" >&2
      exit 2
      ;;
  esac
done
(cd "$out" && rm -rf dynamic/*.claims && find dynamic dynamic-tests.txt learning-*.log -type f 2> /dev/null | tar -czf dynamic.tar.gz -T -)
exit "$status"
