#!/usr/bin/env bash
# LoRA fine-tuning on every visible device, plain data parallel (torchrun): the base is frozen, nothing large to shard.
#   bash chatglm_lora/train_torchrun.sh                                  # built-in tiny model, sample data
#   MODEL=THUDM/chatglm-6b DATA=my.jsonl NPROC=2 bash chatglm_lora/train_torchrun.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" "$@"
