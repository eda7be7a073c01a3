#!/usr/bin/env bash
# Stage 2: the language model learns to answer questions about pictures, with DeepSpeed ZeRO-2.
#   bash train_llava/train_stage2.sh                                  # built-in tiny model, sample questions
#   MODEL=output/stage1/final DATA=questions.json bash train_llava/train_stage2.sh --image_folder pictures --train_type lora
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --deepspeed "$here/ds_zero2.json" "$@"
