#!/usr/bin/env bash
# The other nodes of a job whose first node runs run_ddp_master.sh: the same settings, and this node's rank.
#   NODE_RANK=1 MASTER_ADDR=node0 DATA_DIR=data/imagenet ./run_ddp_worker.sh
set -euo pipefail
: "${NODE_RANK:?set NODE_RANK to 1, 2, ... on the second, third, ... node}"
if [ "$NODE_RANK" = 0 ]; then
  echo "error: node 0 runs run_ddp_master.sh" >&2
  exit 2
fi
exec "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/run_ddp_master.sh" "$@"
