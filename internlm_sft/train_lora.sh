#!/usr/bin/env bash
# LoRA on every visible device, plain data parallel (the base model is frozen: nothing large to shard).
#   bash internlm_sft/train_lora.sh                                     # built-in tiny model, sample data
#   MODEL=models/internlm2 DATA="identity refusal general.jsonl" bash internlm_sft/train_lora.sh --name 小埋 --author 良睦路程序员
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --use_lora true "$@"
