#!/bin/bash
# sbatch this file, from a folder that all nodes share. Made by `sftmix launch --template slurm`.
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --signal=B:USR1@$warning
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
$options
set -u
cd -- $folder || exit 2
export SRUN_CPUS_PER_TASK=$cpus  # srun does not take it over from sbatch

hostfile="$$(mktemp)" || exit 1
trap 'rm -f "$$hostfile"' EXIT
scontrol show hostnames "$$SLURM_JOB_NODELIST" | sed 's/$$/ slots=$gpus/' > "$$hostfile"

# In the background: bash handles a signal only once what it waits for has ended.
$python -m sftmix.cli launch $arguments --hostfile "$$hostfile" --launcher slurm &
launch=$$!
asked=no
is_cancelled=no
trap 'asked=yes; kill -USR1 "$$launch"' USR1  # the time is nearly over: save and stop
trap 'asked=yes; is_cancelled=yes; kill -TERM "$$launch"' TERM
while true; do
    wait "$$launch"
    code=$$?
    if [ "$$asked" = no ] || [ "$$code" -le 128 ]; then break; fi
    asked=no  # it was the signal that ended the wait, not the run
done

if [ "$$code" -eq 75 ] && [ "$$is_cancelled" = no ]; then  # stopped and saved: start again
    scontrol requeue "$$SLURM_JOB_ID"
fi
exit "$$code"
