#!/usr/bin/env bash
# LoRA (or full: --use_lora false) with DeepSpeed ZeRO-2 on every visible device.
#   bash internlm_sft/train_zero2.sh                                    # built-in tiny model, sample data
#   MODEL=models/internlm2 DATA="identity refusal general.jsonl" bash internlm_sft/train_zero2.sh --name 小埋 --author 良睦路程序员
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --deepspeed "$here/ds_zero2.json" "$@"
