#!/usr/bin/env bash
# build.sh PYTHON FOLDER: compiles the simulated CANN against that Python's torch, laid out like a real installation:
#   FOLDER/ascend-toolkit/set_env.sh           to be sourced, as on a machine with an NPU
#   FOLDER/ascend-toolkit/latest/lib64/*.so    the simulated libraries
#   FOLDER/bin/npu-smi                         a stub that says SIMULATED
# FOLDER may be moved afterwards. simulator.py calls this once and keeps the result.
set -euo pipefail
python=$1
folder=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
compiler=${CXX:-g++}
toolkit=$folder/ascend-toolkit/latest
platform=$(uname -m)-linux # where torch_npu and others look for CANN's version
objects=$folder/objects
mkdir -p "$objects" "$folder/bin" "$toolkit"/{lib64,opp,runtime,compiler,include} "$toolkit/$platform"

torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
flags=(-std=c++20 -O1 -fPIC -Wall -Wextra -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include")
compile() {
    local name
    for name in "$@"; do "$compiler" "${flags[@]}" -c "$here/$name.cpp" -o "$objects/$name.o"; done
}
trap wait EXIT # an error in one half does not leave the other writing
compile operators cann hccl &
compile fused_operators aclnn
wait $!
# no run path to libtorch: it is in the process before torch_npu loads this
"$compiler" -shared -Wl,-soname,libascendcl.so "$objects"/*.o -o "$toolkit/lib64/libascendcl.so" \
    -L"$torch/lib" -ltorch_cpu -lc10 -lpthread
rm -r "$objects"
for name in hccl acl_op_compiler ge_runner graph acl_tdt_channel runtime opapi; do
    ln -s libascendcl.so "$toolkit/lib64/lib$name.so"
done

printf 'package_name=Ascend-cann-toolkit\nversion=9.1.0\n' >"$toolkit/$platform/ascend_toolkit_install.info"
cp "$here/set_env.sh" "$folder/ascend-toolkit/set_env.sh"
cp "$here/npu_smi.sh" "$folder/bin/npu-smi"
chmod 755 "$folder/bin/npu-smi"
