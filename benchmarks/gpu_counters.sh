#!/usr/bin/env bash
# On a machine with a CUDA GPU and Nsight Compute: hardware counters of the kernels whose bars are missed, and, for gathers and
# steps under masks in aligned runs, how wide their loads are.
# usage: bash benchmarks/gpu_counters.sh [OUTPUT_FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"
counters=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__inst_executed.avg.per_cycle_elapsed
counters+=,smsp__issue_active.avg.pct_of_peak_sustained_active,smsp__inst_executed.sum,l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum
counters+=,l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum,lts__t_sectors_op_read.sum,lts__t_sectors_op_write.sum
ncu --clock-control none --metrics "$counters" --kernel-name-base function --launch-count 40 --csv --log-file "$out/counters.csv" \
  python3 -P - << 'END'
import torch

import sparseopt as so
from sparseopt import functional

n = 1 << 28
for run in (1, 16):
    mask = (torch.rand(n // run, device="cuda") < 0.025).repeat_interleave(run)
    packed = functional.pack_mask(mask)
    functional.mask_indices(packed, n)
    p = torch.nn.Parameter(torch.randn(n, device="cuda").bfloat16())
    optimizer = so.SparseAdamW([("p", p)], masks={"p": mask.cpu()}, lr=1e-3, max_grad_norm=1.0, master_weights="fp32")
    for _ in range(2):
        p.grad = torch.randn(n, device="cuda").bfloat16()
        optimizer.step()
torch.cuda.synchronize()
END
python3 - "$out/counters.csv" << 'END'
import csv
import sys

lines = [line for line in open(sys.argv[1]) if line.startswith('"')]
for row in csv.DictReader(lines):
    if "sparse" in row["Kernel Name"] or "mask" in row["Kernel Name"] or "gather" in row["Kernel Name"] or "step" in row["Kernel Name"]:
        print(row["ID"], row["Kernel Name"][:40], row["Metric Name"], row["Metric Value"], row["Metric Unit"])
END
