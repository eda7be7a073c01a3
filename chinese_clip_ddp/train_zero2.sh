#!/usr/bin/env bash
# Both towers, one of them or adapters, with DeepSpeed ZeRO-2 on every visible device.
#   bash chinese_clip_ddp/train_zero2.sh                                    # built-in tiny model, sample data
#   MODEL=OFA-Sys/chinese-clip-vit-base-patch16 DATA=pairs.csv bash chinese_clip_ddp/train_zero2.sh --loss sigmoid
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --deepspeed "$here/ds_zero2.json" "$@"
