#!/usr/bin/env bash
# The image's words:
#
#   train CONFIG.yaml [KEY=VALUE...]   on every GPU of this machine (or as NPROC_PER_NODE, NNODES, NODE_RANK and RDZV_ENDPOINT say)
#   eval RUN_FOLDER [LAYERS...]        the same
#   shards build|index|verify|...      make and check data sets
#   doctor [CONFIG.yaml] [--quick]     whether this machine is fit for training
#   config, data, report, parts, ...   every other command of clipscale
set -euo pipefail

if [ $# -eq 0 ] || [ "$1" = --help ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  exit 0
fi

# Triton's driver module, compiled when the image was built; the cache may be a volume that was mounted empty.
if mkdir -p "$TRITON_CACHE_DIR" 2>/dev/null; then
  cp --recursive --no-clobber /opt/clipscale/triton/. "$TRITON_CACHE_DIR/" || true
else
  echo "clipscale: $TRITON_CACHE_DIR cannot be written: fused kernels will not run; mount a volume there that user $(id -u) may write" >&2
fi

case $1 in
  train | eval) exec /opt/clipscale/launch/torchrun.sh "$@" ;;
  shards) exec clipscale-shards "${@:2}" ;;
  *) exec clipscale "$@" ;;
esac
