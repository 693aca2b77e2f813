#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Train under Slurm, one torchrun per machine; run it from the clone, in the environment that has Detectron2:
#
#   sbatch --nodes 2 --gpus-per-node 8 tools/slurm_train.sh --config-file configs/dino_r50_4scale_12ep.py \
#       train.output_dir=output/r50
#
# A worker that dies is started again with the others, up to three times; a job that Slurm requeues continues from its
# last checkpoint. Two minutes before the time limit (--signal), all workers write a checkpoint and end, and the job is
# requeued, again and again until the training is complete. The output folder must be seen by all machines.
# PROCESSES: per machine, if not one per GPU.
set -euo pipefail

processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Every attempt gets a store of its own, so that none meets the addresses of dead workers.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$processes" \
    --max-restarts 3 \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "${hosts[0]}:$((20000 + SLURM_JOB_ID % 20000))" \
    tools/lazyconfig_train_net.py "$@" &
step=$!

# srun passes SIGTERM on to torchrun on every machine, and torchrun to its workers: each has 30 seconds to end.
requeue=
trap 'requeue=1; kill -TERM "$step" || true' USR1
trap 'kill -TERM "$step" || true' TERM INT

while kill -0 "$step" 2> /dev/null; do
    wait "$step" || true # a signal ends it early
done
status=0
wait "$step" || status=$?
if [[ $requeue && $status -ne 0 ]]; then
    echo "requeueing job $SLURM_JOB_ID, which continues from its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
