#!/usr/bin/env bash
# Preference training (DPO) with DeepSpeed ZeRO-2 on every visible device.
#   bash baichuan2_dpo/train_zero2.sh                             # built-in tiny model, sample data
#   MODEL=models/baichuan2-7b DATA=pairs.jsonl bash baichuan2_dpo/train_zero2.sh --beta 0.2
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --deepspeed "$here/ds_zero2.json" "$@"
