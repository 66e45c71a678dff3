#!/bin/bash
#SBATCH --job-name=sparseopt-train
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:INT@120
# One training run, on Slurm or without:
#     sbatch [--partition=gpu --gpus=1 --time=8:00:00 ...] configs/train_with_config.sh [CONFIG] [FLAGS of sparseopt train lm]
#     bash configs/train_with_config.sh my_config.yaml --set training.seed=1
# Two minutes before the time limit the training is interrupted as by Ctrl-C.
set -euo pipefail
config=${1:-configs/train_config.yaml}
[ $# -eq 0 ] || shift
# The folder of the submission: an environment there goes before the caller's.
[ ! -x .venv/bin/sparseopt ] || PATH="$PWD/.venv/bin:$PATH"
exec sparseopt train lm --config "$config" "$@"
