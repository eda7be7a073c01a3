#!/usr/bin/env bash
# npu-smi of the simulated CANN, for tests only, not Huawei software: a table like that of `npu-smi info`. Nothing in it
# is measured.
set -euo pipefail
count=${NPU_SIM_DEVICES:-8}
name=${NPU_SIM_SOC:-Ascend910B2}
name=${name#Ascend}
case $name in
    910A | 910B | 910B4 | 910Pro* | 910PremiumA) gib=32 ;;
    310P*) gib=24 ;;
    *) gib=64 ;;
esac
mib=$(awk -v gib="${NPU_SIM_MEM_GB:-$gib}" 'BEGIN { printf "%d", gib * 1024 }')

line() { printf '+%s+%s+%s+\n' "${1//?/-}" "${2//?/-}" "${3//?/-}"; }
row() { printf '| %-25s | %-13s | %-46s |\n' "$1" "$2" "$3"; }
frame() { line "                           " "               " "                                                "; }

info() {
    printf '+%s+\n' "$(printf '%.0s-' {1..92})"
    printf '| %-90s |\n' "npu-smi SIMULATED    Version: 0.0.0    no hardware stands behind this table"
    frame
    row "NPU   Name" "Health" "Power(W)    Temp(C)    Hugepages-Usage(page)"
    row "Chip" "Bus-Id" "AICore(%)   Memory-Usage(MB)   HBM-Usage(MB)"
    frame
    for ((i = 0; i < count; i++)); do
        row "$(printf '%-5d %s' "$i" "$name")" "OK" "0           0          0 / 0"
        row "0" "$(printf '0000:%02X:00.0' "$((i + 1))")" "0           0 / 0              0 / $mib"
        frame
    done
    printf '| %-90s |\n' "SIMULATED: processes are not listed"
    printf '+%s+\n' "$(printf '%.0s-' {1..92})"
}

case "$*" in
    info) info ;;
    "info -l")
        printf 'SIMULATED\n\tTotal Count                    : %d\n' "$count"
        for ((i = 0; i < count; i++)); do printf '\n\tNPU ID                         : %d\n\tChip Count                     : 1\n' "$i"; done
        ;;
    -v | --version) echo "npu-smi SIMULATED Version: 0.0.0" ;;
    *)
        echo "npu-smi SIMULATED: only 'npu-smi info', 'npu-smi info -l' and 'npu-smi -v' are simulated" >&2
        exit 1
        ;;
esac
