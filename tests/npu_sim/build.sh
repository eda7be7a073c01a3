#!/usr/bin/env bash
# build.sh PYTHON FOLDER: compiles the simulated CANN against that Python's torch, laid out like a real installation:
#   FOLDER/ascend-toolkit/set_env.sh           to be sourced, as on a machine with an NPU
#   FOLDER/ascend-toolkit/latest/lib64/*.so    the simulated runtime
#   FOLDER/bin/npu-smi                         a stub that says SIMULATED
# FOLDER may be moved afterwards. simulator.py calls this once and keeps the result.
set -euo pipefail
python=$1
folder=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
toolkit=$folder/ascend-toolkit/latest
library=$toolkit/lib64
objects=$folder/objects
platform=$(uname -m)-linux
mkdir -p "$library" "$toolkit"/{opp,runtime,compiler,include} "$toolkit/$platform" "$folder/bin" "$objects"

torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
flags=(-std=c++20 -O1 -fPIC -w "-I$torch/include" "-I$torch/include/torch/csrc/api/include")
compile() { "${CXX:-g++}" "${flags[@]}" -c "$here/$1.cpp" -o "$objects/$1.o"; }
compile kernels &
compile cann
wait $!
# libtorch is not recorded as a run path: it is in the process before torch_npu loads these libraries
"${CXX:-g++}" -shared -Wl,-soname,libascendcl.so "$objects"/{cann,kernels}.o -o "$library/libascendcl.so" \
    -L"$torch/lib" -ltorch_cpu -lc10 -lpthread
for name in hccl acl_op_compiler ge_runner graph acl_tdt_channel runtime opapi; do
    ln -sf libascendcl.so "$library/lib$name.so"
done
rm -r "$objects"
printf 'package_name=Ascend-cann-toolkit\nversion=8.5.0\n' >"$toolkit/$platform/ascend_toolkit_install.info"

cat >"$folder/ascend-toolkit/set_env.sh" <<'SET_ENV'
# A simulated CANN, for tests only. Not Huawei software.
_npu_sim=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ASCEND_TOOLKIT_HOME="$_npu_sim/ascend-toolkit/latest"
export ASCEND_HOME_PATH="$ASCEND_TOOLKIT_HOME" ASCEND_AICPU_PATH="$ASCEND_TOOLKIT_HOME"
export ASCEND_OPP_PATH="$ASCEND_TOOLKIT_HOME/opp"
export LD_LIBRARY_PATH="$ASCEND_TOOLKIT_HOME/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PATH="$_npu_sim/bin:$PATH"
export TASK_QUEUE_ENABLE=0
unset _npu_sim
SET_ENV

cat >"$folder/bin/npu-smi" <<'NPU_SMI'
#!/usr/bin/env bash
echo "| npu-smi SIMULATED    Version: 0.0.0 |"
for ((i = 0; i < ${NPU_SIM_DEVICES:-8}; i++)); do
    echo "| $i  ${NPU_SIM_SOC:-Ascend910B2} | OK | 0 / 0 |"
done
NPU_SMI
chmod +x "$folder/bin/npu-smi"
