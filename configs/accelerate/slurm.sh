#!/bin/bash
# Several machines under Slurm: `sbatch configs/accelerate/slurm.sh train/text_to_cxr.py --config RECIPE.yaml [section.field=value ...]`
# One task per GPU, started by srun itself, so that Slurm's warning reaches every process: two minutes before the time limit the
# run saves and exits with code 75, and the job is queued again until training is done.
#SBATCH --job-name=medgen
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500

srun --kill-on-bad-exit=0 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec python "$@"' worker "$@"
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
