#!/bin/bash
#SBATCH --job-name=sparseopt-sweep
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:INT@120
# A whole sweep in one job, one run after the other (`sparseopt sweep submit` makes a job of each run):
#     sbatch [--partition=gpu --gpus=1 --time=1-0 ...] configs/run_sweep.sh [CONFIG [SWEEP_FILE]] [FLAGS of sparseopt sweep run]
#     bash configs/run_sweep.sh my_config.yaml my_sweep.yaml --jobs 2
# Submitted again after its time limit, it goes on with what is not finished.
set -euo pipefail
config=${1:-configs/train_config.yaml}
sweep=${2:-configs/sweep_config.yaml}
[ $# -lt 2 ] || shift
[ $# -eq 0 ] || shift
# The folder of the submission: an environment there goes before the caller's.
[ ! -x .venv/bin/sparseopt ] || PATH="$PWD/.venv/bin:$PATH"
exec sparseopt sweep run "$config" "$sweep" "$@"
