# shellcheck shell=bash
# Environment of the simulated CANN; for tests only, not Huawei software. To be sourced from wherever it lies.
_npu_sim=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ASCEND_TOOLKIT_HOME="$_npu_sim/ascend-toolkit/latest"
export ASCEND_HOME_PATH="$ASCEND_TOOLKIT_HOME"
export ASCEND_AICPU_PATH="$ASCEND_TOOLKIT_HOME"
export ASCEND_OPP_PATH="$ASCEND_TOOLKIT_HOME/opp"
export LD_LIBRARY_PATH="$ASCEND_TOOLKIT_HOME/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PATH="$_npu_sim/bin:$PATH"
export TASK_QUEUE_ENABLE=0
unset _npu_sim
