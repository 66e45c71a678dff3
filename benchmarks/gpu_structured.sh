#!/usr/bin/env bash
# On a machine with a CUDA GPU: the GPU tests of structured masks, then whole training steps under column and row masks beside
# element masks, dense fused AdamW and LoRA. Each part has its own time, so that a slow compilation costs its own figures only.
# usage: bash benchmarks/gpu_structured.sh OUTPUT_FOLDER [tests|eager|compiled|graphs|layers|small|large ...]
# (without names: all of them but layers; each of compiled, graphs, layers and small takes minutes, for compiling)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
parts=${*:2}
parts=${parts:-tests eager large compiled graphs small}
mkdir -p "$out"
python3 -m pip install -q --no-build-isolation --no-deps -e . || exit 1
status=0
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
measure() { # SECONDS ARGUMENTS...: SIGINT ends it early with what it has
  timeout --signal=INT --kill-after=30 "$1" python3 -P -m sparseopt.benchmarks.train_step --master fp32 --density 2.5% "${@:2}" \
    --output "${into:-$out}" 2>> "$out/structured.log" || { status=1; tail -5 "$out/structured.log"; }
}
for part in $parts; do
  echo "== $part"
  case $part in
    tests)
      timeout 150 pytest -q -m "gpu and not slow" tests/optim/test_structured_gpu.py -p no:cacheprovider --timeout=120 \
        > "$out/structured-tests.txt" 2>&1 || status=1
      tail -5 "$out/structured-tests.txt"
      ;;
    eager)
      measure 200 --shape llama-3.2-3b --batch 1 --seq 512 --rounds 20 --warmup 4 \
        --arms dense-fused,lora,sparse,sparse/runs16,sparse/columns,sparse/rows --mode eager
      ;;
    compiled) # in one piece; all arms compile at once, for a minute or two
      measure 400 --shape llama-3.2-3b --batch 1 --seq 512 --rounds 30 --warmup 5 --passes 3 --together \
        --arms dense-fused,sparse/columns,sparse/rows,lora --mode whole
      ;;
    graphs) # the same as CUDA graphs
      measure 400 --shape llama-3.2-3b --batch 1 --seq 512 --rounds 30 --warmup 6 --passes 3 --together \
        --arms dense-fused,sparse/columns,sparse/rows,lora --mode graphs
      ;;
    layers) # by layer instead of in one piece
      measure 400 --shape llama-3.2-3b --batch 1 --seq 512 --rounds 30 --warmup 5 --passes 3 --together \
        --arms dense-fused,sparse/columns,lora --mode compiled
      ;;
    small)
      measure 400 --shape llama-3.2-1b --batch 4 --seq 1024 --rounds 30 --warmup 5 --passes 3 --together \
        --arms dense-fused,sparse/columns,lora --mode whole
      ;;
    large)
      measure 300 --shape llama-3.1-8b --batch 1 --seq 512 --rounds 8 --warmup 3 --passes 1 --gradient_checkpointing \
        --master residual --arms sparse/columns,lora,sparse/rows --mode eager
      ;;
    *)
      echo "expected tests, eager, compiled, graphs, layers, small or large, got $part" >&2
      exit 2
      ;;
  esac
done
(cd "$out" && find . -name '*.json' -o -name '*.md' -o -name '*.png' -o -name 'structured*.txt' -o -name 'structured.log' |
  tar -czf structured.tar.gz -T -)
exit "$status"
