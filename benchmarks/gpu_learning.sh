#!/usr/bin/env bash
# On a machine with a CUDA GPU, SmolLM2's wheel and the packages of the extra `demo`: what sparse training learns there. Each
# part goes on where it was stopped, if its folder is still there.
# usage: bash benchmarks/gpu_learning.sh chain|curves|study [OUTPUT_FOLDER] [SECONDS]
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?chain, curves or study} out=${2:-build/gpu} seconds=${3:-480}
mkdir -p "$out"
commit=${SPARSEOPT_COMMIT:-$(git rev-parse --short HEAD 2> /dev/null || echo unknown)}
case $part in
  chain)
    timeout --signal=INT "$seconds" python3 -P -m sparseopt train chain --config configs/chain_gpu.yaml --output_dir "$out/chain"
    status=$?
    # Weights stay behind: reports, figures and curves travel.
    (cd "$out" && find chain -name '*.json' -o -name '*.jsonl' -o -name '*.md' -o -name '*.png' | tar -czf chain.tar.gz -T -)
    ;;
  curves)
    python3 -P -m sparseopt.benchmarks.grpo_curves "$out/grpo" --time_limit "$seconds" --commit "$commit"
    status=$?
    (cd "$out" && tar -czf grpo.tar.gz grpo/grpo_curves.json grpo/grpo_curves.png grpo/*/results.json grpo/*/metrics.jsonl)
    ;;
  study)
    python3 -P -m sparseopt.benchmarks.study "$out" --time_limit "$seconds" --commit "$commit"
    status=$?
    ;;
  *)
    echo "expected chain, curves or study, got $part" >&2
    exit 2
    ;;
esac
exit "$status"
