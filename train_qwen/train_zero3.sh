#!/usr/bin/env bash
# Full or LoRA SFT with DeepSpeed ZeRO-3 on every visible device.
#   bash train_qwen/train_zero3.sh                                    # built-in tiny model, sample data
#   MODEL=Qwen/Qwen3-8B DATA=my.jsonl bash train_qwen/train_zero3.sh --use_lora true
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --deepspeed "$here/ds_zero3.json" "$@"
