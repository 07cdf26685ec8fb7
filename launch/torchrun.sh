#!/usr/bin/env bash
# Run a clipscale command on every GPU of this node (or on 2 CPU processes), or on many nodes with one rendezvous endpoint.
#
#   launch/torchrun.sh train configs/demo.yaml
#   NPROC_PER_NODE=4 launch/torchrun.sh train CONFIG.yaml optimizer.lr=1e-3
#   NNODES=8 NODE_RANK=0 RDZV_ENDPOINT=host0:29500 launch/torchrun.sh train CONFIG.yaml     # the same on every node
#
# NPROC_PER_NODE  processes on this node; default: one a GPU, 2 without a GPU
# NNODES          nodes; default 1                 NODE_RANK      this node's number; default 0
# RDZV_ENDPOINT   host:port of node 0; needed when NNODES > 1
# RDZV_ID         one word for this launch, the same on every node; default clipscale
# MAX_RESTARTS    restarts from the newest checkpoint after a rank has died; default 0
# SHUTDOWN_TIMEOUT  seconds the ranks get to write their checkpoint after SIGTERM; default 120
# LOG_DIR         folder for what each rank prints, node-N/…/attempt_M/RANK/stderr.log; the terminal then shows each node's first rank
# INTERFACE       the network interface that NCCL and gloo use, eth0 say; default: their own choice
# PYTHON          the interpreter; default python3
#
# Exit code: 0 finished, 1 failed, 2 wrong request, 128 + n stopped by signal n behind a checkpoint: the same command goes on.
set -euo pipefail
trap '' USR1 USR2 # from a scheduler these are for the ranks; what launches them must not die of it

if [ $# -eq 0 ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

python=${PYTHON:-python3}
nodes=${NNODES:-1}
node=${NODE_RANK:-0}
processes=${NPROC_PER_NODE:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}

if [ "$1" = train ]; then # a wrong request ends here, with one message, before any process is launched
  "$python" -m clipscale train "${@:2}" --check --ranks $((nodes * processes))
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # restarted ranks would meet the dead ones' keys
if [ -n "${INTERFACE:-}" ]; then
  export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi

options=(--nnodes "$nodes" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-0}" --shutdown-timeout "${SHUTDOWN_TIMEOUT:-120}")
if [ "$nodes" -gt 1 ]; then
  endpoint=${RDZV_ENDPOINT:?RDZV_ENDPOINT=host:port of node 0 is needed with NNODES > 1}
  options+=(--rdzv-backend c10d --rdzv-id "${RDZV_ID:-clipscale}" --rdzv-endpoint "$endpoint" --node-rank "$node")
else
  options+=(--standalone --local-addr 127.0.0.1) # no look-up of this machine's own name, which containers may not know
fi
if [ -n "${LOG_DIR:-}" ]; then
  options+=(--log-dir "$LOG_DIR/node-$node" --tee 3 --local-ranks-filter 0)
fi

exec "$python" -m clipscale.launcher "${options[@]}" -m clipscale "$@"
