#!/usr/bin/env bash
# Any text encoder with any vision tower, or a whole model, plain data parallel on every visible device.
#   bash chinese_clip_ddp/train_ddp_text_image.sh                     # built-in tiny model, sample data
#   DATA=pairs.csv bash chinese_clip_ddp/train_ddp_text_image.sh --text_model_name_or_path BAAI/bge-base-zh-v1.5 --image_model_name_or_path facebook/dinov2-base --train image
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" "$@"
