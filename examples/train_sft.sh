#!/usr/bin/env bash
# Stage 1: PRETRAIN=/path/to/LLaMa-7B/ DATASET=/path/to/data.json ./train_sft.sh
# More flags may follow: `./train_sft.sh --strategy colossalai_zero2` is the published command once that is built.
set -euo pipefail
PRETRAIN=${PRETRAIN:-/path/to/LLaMa-7B/}
DATASET=${DATASET:-/path/to/data.json}
SAVE_PATH=${SAVE_PATH:-/path/to/Coati-7B}
MODEL=${MODEL:-llama}
STRATEGY=${STRATEGY:-ddp}
PROCESSES=${PROCESSES:-4}

set -x
torchrun --standalone --nproc_per_node="$PROCESSES" "$(dirname "$0")/train_sft.py" \
    --pretrain "$PRETRAIN" \
    --model "$MODEL" \
    --strategy "$STRATEGY" \
    --log_interval 10 \
    --save_path "$SAVE_PATH" \
    --dataset "$DATASET" \
    --batch_size 4 \
    --accimulation_steps 8 \
    --lr 2e-5 \
    --max_datasets_size 512 \
    --max_epochs 1 \
    "$@"
