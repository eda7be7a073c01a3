#!/usr/bin/env bash
# DeepSpeed ZeRO-2. Without a model or data of your own: both stages on the samples, the first in OUTPUT/stage1.
#   bash train_llava/train_zero2.sh                                   # built-in tiny model: captions, then questions
#   MODEL=my_llava DATA=questions.json bash train_llava/train_zero2.sh --image_folder pictures --train_type full
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
zero2=("$here/train.py" --deepspeed "$here/ds_zero2.json")
own=${MODEL:-}${DATA:-} out=${OUTPUT:-$root/output/$(basename "$here")} anew='' words=("$@")
for i in "${!words[@]}"; do
    flag=${words[i]%%=*} value=${words[i]#*=}
    if [[ ${words[i]} != *=* ]]; then value=${words[i + 1]:-}; fi
    case ${flag//-/_} in
        __model_name_or_path | __data_path | __data | __train_data | __train_type | __use_lora) own=1 ;;
        __output_dir) out=$value ;;
        __overwrite_output_dir) if [[ ! ${value,,} =~ ^(false|f|no|n|0)$ ]]; then anew=1; fi ;;
    esac
done
if [[ -n $own ]]; then launch "${zero2[@]}" "$@"; fi
if [[ ! -d $out/stage1/final || -n $anew ]]; then
    (launch "${zero2[@]}" --train_type projector "$@" --output_dir "$out/stage1")
fi
OUTPUT=$out launch "${zero2[@]}" --stage_1 "$out/stage1/final" "$@"
