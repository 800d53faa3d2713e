#!/usr/bin/env bash
# Stage 2: PRETRAIN=/path/to/Coati-7B DATASET=pairs.json ./train_rm.sh
# More flags may follow: `./train_rm.sh --strategy colossalai_zero2` is the published command once that is built.
set -euo pipefail
PRETRAIN=${PRETRAIN:-/path/to/LLaMa-7B/}
DATASET=${DATASET:-Dahoas/rm-static}
SAVE_PATH=${SAVE_PATH:-rmstatic.pt}
MODEL=${MODEL:-llama}
STRATEGY=${STRATEGY:-ddp}
PROCESSES=${PROCESSES:-4}

set -x
torchrun --standalone --nproc_per_node="$PROCESSES" "$(dirname "$0")/train_reward_model.py" \
    --pretrain "$PRETRAIN" \
    --model "$MODEL" \
    --strategy "$STRATEGY" \
    --dataset "$DATASET" \
    --loss_fn 'log_exp' \
    --save_path "$SAVE_PATH" \
    "$@"
