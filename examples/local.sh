#!/usr/bin/env bash
# Kinkajou on one machine, one process for each GPU, with no port open to the outside.
#
#   examples/local.sh sft recipes/sft.toml --strategy zero3 --output runs/sft
#
# `torchrun --standalone` does the same, but listens at two ports on all network interfaces while the run lasts. Here
# torchrun's processes meet in a file, and rank 0 at the loopback.
#   PER_NODE  processes (all GPUs, else 2)        RESTARTS  how often a run that lost a process starts again (0)
#   PYTHON    the Python with kinkajou in it
set -euo pipefail

PYTHON=${PYTHON:-python}
PER_NODE=${PER_NODE:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
[ "$PER_NODE" -gt 0 ] || PER_NODE=2
MEETING=$(mktemp -d)
trap 'rm -rf "$MEETING"' EXIT

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / PER_NODE > 0 ? $(nproc) / PER_NODE : 1))}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # the processes' own table then lies with rank 0
"$PYTHON" -m torch.distributed.run --nproc_per_node "$PER_NODE" --max_restarts "${RESTARTS:-0}" \
    --rdzv_backend c10d --rdzv_endpoint "$MEETING/ranks" --rdzv_conf store_type=file --rdzv_id "local-$$" \
    -m kinkajou "$@"
