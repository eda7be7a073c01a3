#!/usr/bin/env bash
# LoRA fine-tuning with DeepSpeed ZeRO-3 on every visible device.
#   bash chatglm_lora/train_zero3.sh                                     # built-in tiny model, sample data
#   MODEL=THUDM/chatglm-6b DATA=my.jsonl bash chatglm_lora/train_zero3.sh --lora_r 16
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --deepspeed "$here/ds_zero3.json" "$@"
