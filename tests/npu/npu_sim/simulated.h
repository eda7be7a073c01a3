// What the parts of the simulated CANN share. For tests only; not Huawei software.
#pragma once

#include <atomic>
#include <string>

#define CANN_API extern "C" __attribute__((visibility("default")))

namespace npu_sim {

// A chip as far as programs can tell it from another one.
struct Chip {
  std::string name;         // what aclrtGetSocName answers
  bool known = false;       // false: aclInit refuses it
  bool bfloat16 = false;    // computes in bfloat16
  bool float8 = false;      // computes in float8
  bool saturates = false;   // an overflow gives +-max and raises a flag; else it gives infinity
  bool transformer = true;  // has the fused attention and SwiGLU kernels
  double memory_gib = 64;
};
const Chip& chip();

// Environment variable, or `otherwise` when it is unset or empty.
std::string setting(const char* name, const char* otherwise);
// The id of the current device as the driver counts, before ASCEND_RT_VISIBLE_DEVICES.
int physical_device();
// Prints "[npu-sim] message" and keeps it for aclGetRecentErrMsg, so that torch_npu's exception ends with it.
// Gives back `code`.
int failed(int code, const std::string& message);

// The overflow flag of a chip that saturates: sticky until a program clears it.
extern std::atomic<bool> overflow_flag;

// operators.cpp: replaces torch_npu's compute kernels in torch's dispatcher; calls the one of fused_operators.cpp.
void install_operators();
void install_fused_operators();

}  // namespace npu_sim
