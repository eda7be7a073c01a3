#!/usr/bin/env bash
# LoRA SFT on every visible device, plain data parallel (the base model is frozen: nothing large to shard).
#   bash chinese_bloom/train_lora.sh                                  # built-in tiny model, sample data
#   MODEL=bigscience/bloomz-7b1 DATA=my.jsonl bash chinese_bloom/train_lora.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --use_lora true "$@"
