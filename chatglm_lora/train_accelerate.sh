#!/usr/bin/env bash
# LoRA fine-tuning as `accelerate launch` starts it: DeepSpeed ZeRO-3, weights and optimizer state in host memory.
#   bash chatglm_lora/train_accelerate.sh                                # built-in tiny model, sample data
#   MODEL=THUDM/chatglm-6b DATA=my.jsonl NPROC=2 bash chatglm_lora/train_accelerate.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch --accelerate "$here/accelerate_zero3_offload.yaml" "$here/train.py" "$@"
