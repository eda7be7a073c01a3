#!/usr/bin/env bash
# Full or LoRA SFT with DeepSpeed ZeRO-3 on every visible device.
#   bash chinese_bloom/train_zero3.sh                                    # built-in tiny model, sample data
#   MODEL=bigscience/bloomz-1b7 DATA=my.jsonl bash chinese_bloom/train_zero3.sh --use_lora true
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --deepspeed "$here/ds_zero3.json" "$@"
