#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
# Train under Slurm, one torchrun per machine; run it from the clone, in the environment that has Detectron2:
#
#   sbatch --nodes 2 --gpus-per-node 8 tools/slurm_train.sh --config-file configs/dino_r50_4scale_12ep.py \
#       train.output_dir=output/r50
#
# A worker that dies is started again with the others, up to three times; a job that Slurm requeues continues from its
# last checkpoint. The output folder must be seen by all machines. PROCESSES: per machine, if not one per GPU.
set -euo pipefail

processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Every attempt gets a store of its own, so that none meets the addresses of dead workers.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$processes" \
    --max-restarts 3 \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "${hosts[0]}:$((20000 + SLURM_JOB_ID % 20000))" \
    tools/lazyconfig_train_net.py "$@"
