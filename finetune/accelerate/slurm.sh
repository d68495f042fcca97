#!/bin/bash
# Training on a Slurm cluster, from the repository root:
#   sbatch --nodes=2 finetune/accelerate/slurm.sh finetune/pretrain.py --config finetune/configs/dit_3_3b.yaml
# The same command goes on from the newest checkpoint, also with another number of nodes.
#SBATCH --job-name=mf-diffusers
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
set -euo pipefail

export GPUS_PER_NODE=8
export MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# --kill-on-bad-exit: when a machine fails, the others must not wait for it.
srun --kill-on-bad-exit=1 bash -c 'accelerate launch --config_file finetune/accelerate/fsdp2_nodes.yaml \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS_PER_NODE)) \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" --main_process_port 29500 "$@"' - "$@"
