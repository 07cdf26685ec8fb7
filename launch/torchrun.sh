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
# MAX_RESTARTS    restarts after a rank has died; default 0
# SHUTDOWN_TIMEOUT  seconds the ranks get to write their checkpoint after SIGTERM; default 120
# PYTHON          the interpreter; default python3
set -euo pipefail

if [ $# -eq 0 ]; then
  sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

python=${PYTHON:-python3}
nodes=${NNODES:-1}
processes=${NPROC_PER_NODE:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}

if [ "$1" = train ]; then # a wrong request ends here, with one message, before any process is launched
  "$python" -m clipscale train "${@:2}" --check --ranks $((nodes * processes))
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # restarted ranks would meet the dead ones' keys
if [ "$nodes" -gt 1 ]; then
  rendezvous=(--rdzv-backend c10d --rdzv-id "${RDZV_ID:-clipscale}"
    --rdzv-endpoint "${RDZV_ENDPOINT:?RDZV_ENDPOINT=host:port of node 0 is needed with NNODES > 1}" --node-rank "${NODE_RANK:-0}")
else
  rendezvous=(--standalone --local-addr 127.0.0.1) # no look-up of this machine's own name, which containers may not know
fi

exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-0}" \
  --shutdown-timeout "${SHUTDOWN_TIMEOUT:-120}" \
  "${rendezvous[@]}" -m clipscale "$@"
