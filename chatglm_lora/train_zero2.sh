#!/usr/bin/env bash
# LoRA fine-tuning with DeepSpeed ZeRO-2 on every visible device.
#   bash chatglm_lora/train_zero2.sh                                     # built-in tiny model, sample data
#   MODEL=THUDM/chatglm-6b DATA=my.jsonl bash chatglm_lora/train_zero2.sh --lora_r 16
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --deepspeed "$here/ds_zero2.json" "$@"
