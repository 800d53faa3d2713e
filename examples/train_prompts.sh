#!/usr/bin/env bash
# Stage 3: PRETRAIN=... PROMPTS=... PRETRAIN_DATASET=... RM_PRETRAIN=... RM_PATH=... ./train_prompts.sh
# More flags may follow: `./train_prompts.sh --strategy colossalai_zero2` is the published command once that is built.
set -euo pipefail
PRETRAIN=${PRETRAIN:-/path/to/LLaMa-7B/}
PROMPTS=${PROMPTS:-/path/to/your/prompt_dataset}
PRETRAIN_DATASET=${PRETRAIN_DATASET:-/path/to/your/pretrain_dataset}
RM_PRETRAIN=${RM_PRETRAIN:-/your/pretrain/rm/defination}
RM_PATH=${RM_PATH:-/your/rm/model/path}
SAVE_PATH=${SAVE_PATH:-actor_checkpoint_prompts}
MODEL=${MODEL:-llama}
STRATEGY=${STRATEGY:-ddp}
PROCESSES=${PROCESSES:-4}

set -x
torchrun --standalone --nproc_per_node="$PROCESSES" "$(dirname "$0")/train_prompts.py" \
    --pretrain "$PRETRAIN" \
    --model "$MODEL" \
    --strategy "$STRATEGY" \
    --prompt_path "$PROMPTS" \
    --pretrain_dataset "$PRETRAIN_DATASET" \
    --rm_pretrain "$RM_PRETRAIN" \
    --rm_path "$RM_PATH" \
    --save_path "$SAVE_PATH" \
    "$@"
