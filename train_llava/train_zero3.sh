#!/usr/bin/env bash
# One stage with DeepSpeed ZeRO-3: weights, gradients and optimizer are spread over the devices.
#   bash train_llava/train_zero3.sh                                   # built-in tiny model, sample questions
#   MODEL=my_llava DATA=questions.json bash train_llava/train_zero3.sh --image_folder pictures --train_type full
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --deepspeed "$here/ds_zero3.json" "$@"
