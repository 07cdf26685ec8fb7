#!/usr/bin/env bash
# One launch/torchrun.sh on every node of the Slurm job this runs in; slurm.sbatch and slurm_eval.sbatch call it.
#
#   launch/slurm_tasks.sh train CONFIG.yaml
#
# CONTAINER  run inside this image: a name or .sqsh file through srun's --container-image (needs pyxis), a .sif file through apptainer
# MOUNTS     folders the container sees beside the current one, FROM:TO,FROM:TO
# LOG_DIR    folder for what each rank prints; default logs/JOBID
# and torchrun.sh's NPROC_PER_NODE, MAX_RESTARTS, SHUTDOWN_TIMEOUT, INTERFACE and PYTHON.
set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RDZV_ENDPOINT="$head_node:$((20000 + SLURM_JOB_ID % 20000))"
export RDZV_ID="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" # a requeued job must not meet its dead predecessor
export NNODES="$SLURM_JOB_NUM_NODES"
export LOG_DIR="${LOG_DIR:-logs/$SLURM_JOB_ID}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

here=$(pwd)
srun_options=(--kill-on-bad-exit=0) # each node's launcher waits for its own ranks' checkpoint
inside=()
case "${CONTAINER:-}" in
  '') ;;
  *.sif) inside=(apptainer exec --nv --bind "$here${MOUNTS:+,$MOUNTS}" --pwd "$here" "$CONTAINER") ;;
  *) srun_options+=(--container-image="$CONTAINER" --container-mounts="$here:$here${MOUNTS:+,$MOUNTS}" --container-workdir="$here") ;;
esac

# shellcheck disable=SC2016  # SLURM_NODEID is each task's own
exec srun "${srun_options[@]}" "${inside[@]}" \
  bash -c 'trap "" USR1 USR2; NODE_RANK=$SLURM_NODEID exec launch/torchrun.sh "$@"' clipscale "$@"
