#!/bin/bash
# Train on several machines of a SLURM cluster; before the time limit it saves and puts itself back into the queue,
# until the training is complete. Run from the folder that the config's paths are relative to:
#
#   sbatch slurm_train.sh CONFIG RUN [a.b=c ...] [--overwrite | --resume]
#   sbatch slurm_train.sh configs/hn_ct.yaml runs/hn_ct
#
# Yours: the numbers below, --partition and --account, and how `medattn` comes on the PATH (docs/clusters.md).
#SBATCH --job-name=medattn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

config=$1 run=$2
shift 2
arguments=(train "$config" "run.dir=$run")
# only what this job began, by the folder that torchrun names after it: any other run is refused, not continued
if grep --quiet --no-messages "/${SLURM_JOB_ID}_" "$run/.launches"; then
    arguments+=(--resume "${@/#--overwrite/--resume}")
else
    arguments+=("$@")
fi

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint=${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))
requeue=false
# to the processes of the step; srun itself would kill them at once
trap 'requeue=true; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# one torchrun per machine, which starts a process per GPU
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$endpoint" --shutdown-timeout 150 \
    "$(command -v medattn)" "${arguments[@]}" &
step=$!

code=0
wait "$step" || code=$?
if $requeue; then
    wait "$step" || true # the signal ended the first wait, while the processes still save
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
