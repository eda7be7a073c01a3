#!/usr/bin/env bash
# LoRA SFT on every visible device, plain data parallel (the base model is frozen: nothing large to shard).
#   bash train_qwen/train_lora.sh                                     # built-in tiny model, sample data
#   MODEL=Qwen/Qwen3-8B DATA=my.jsonl bash train_qwen/train_lora.sh --load_in_4bit true
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --use_lora true "$@"
