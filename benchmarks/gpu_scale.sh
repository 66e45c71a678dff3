#!/usr/bin/env bash
# On a machine with two or more CUDA GPUs: DDP and FSDP2 with SparseAdamW against dense AdamW, at the shapes of Llama 3.2 3B and
# Llama 3.1 8B (random weights, 2.5% active), one process a GPU. Each shape has its own time.
# usage: bash benchmarks/gpu_scale.sh [OUTPUT_FOLDER] [SECONDS_A_SHAPE] [GPUS] [SHAPES...]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu} seconds=${2:-270} gpus=${3:-2}
shapes=("${@:4}")
[ ${#shapes[@]} -gt 0 ] || shapes=(llama-3.2-3b llama-3.1-8b)
mkdir -p "$out"
python3 -P -c 'import sparseopt' 2> /dev/null || python3 -m pip install -q --no-build-isolation --no-deps -e . || exit 1
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# NVLink multicast concerns everybody on a shared host: it stays off.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 OMP_NUM_THREADS=8
status=0
for shape in "${shapes[@]}"; do
  timeout --kill-after=20 "$seconds" python3 -P -m torch.distributed.run --standalone --nproc-per-node="$gpus" \
    -m sparseopt.benchmarks.scale_out --shape "$shape" --output "$out/scale" 2>&1 | tee "$out/scale-$shape.log" || status=$?
done
(cd "$out" && tar -czf scale.tar.gz scale scale-*.log)
exit "$status"
