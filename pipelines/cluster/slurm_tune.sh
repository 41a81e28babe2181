#!/bin/bash
# Search with the workers of a SLURM job array, which share a study in PostgreSQL. From the folder that the space's
# paths are relative to:
#
#   sbatch slurm_tune.sh SPACE STORAGE [a.b=c ...]
#   sbatch --array=0-31 slurm_tune.sh configs/tune/learning.yaml postgresql://anna@db.hospital.org/tune
#
# STORAGE without a password: that is in ~/.pgpass. Yours: as in slurm_train.sh (docs/clusters.md).
#SBATCH --job-name=medattn-tune
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

space=$1 storage=$2
shift 2
# a worker that has to stop saves its trial, and another one or the same command again goes on with it
srun medattn tune "$space" "$@" --storage "$storage"
