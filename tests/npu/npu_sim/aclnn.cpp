// The few aclnn functions of CANN that torch_npu calls directly, past torch's dispatcher (in ProcessGroupHCCL, in its
// allocator and in empty tensors). For tests only; not Huawei software.
//
// Each has two halves: the first takes the arguments and gives back an executor, the second runs it.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <functional>
#include <vector>

#include "simulated.h"

namespace {

struct AclTensor {
  at::Tensor tensor;  // a CPU tensor on the memory of an NPU tensor
};
struct AclScalar {
  at::Scalar scalar;
};
using AclIntArray = std::vector<int64_t>;
using Executor = std::function<void()>;

constexpr int kExecutionFailed = 561103;

// aclDataType
at::ScalarType scalar_type(int type) {
  switch (type) {
    case 0:
      return at::kFloat;
    case 1:
      return at::kHalf;
    case 2:
      return at::kChar;
    case 3:
      return at::kInt;
    case 4:
      return at::kByte;
    case 6:
      return at::kShort;
    case 9:
      return at::kLong;
    case 11:
      return at::kDouble;
    case 12:
      return at::kBool;
    case 27:
      return at::kBFloat16;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(false, "[npu-sim] aclDataType ", type, " is not simulated");
}

int prepare(uint64_t* workspace_bytes, Executor** executor, Executor work) {
  *workspace_bytes = 0;
  *executor = new Executor(std::move(work));
  return 0;
}

int execute(Executor* executor) {
  at::AutoDispatchBelowADInplaceOrView guard;
  int result = 0;
  try {
    (*executor)();
  } catch (const std::exception& error) {
    result = npu_sim::failed(kExecutionFailed, error.what());
  }
  delete executor;
  return result;
}

}  // namespace

// The second half of an operator, and the beginning of its first half.
#define ACLNN(name)                                                                                  \
  CANN_API int aclnn##name(void*, uint64_t, Executor* executor, void*) { return execute(executor); } \
  CANN_API int aclnn##name##GetWorkspaceSize

CANN_API AclTensor* aclCreateTensor(const int64_t* sizes, uint64_t dimensions, int type, const int64_t* strides,
                                    int64_t offset, int, const int64_t*, uint64_t, void* data) {
  const at::TensorOptions options(scalar_type(type));
  at::NoGradGuard guard;
  char* begin = static_cast<char*>(data) + offset * options.dtype().itemsize();
  return new AclTensor{at::from_blob(begin, {sizes, dimensions}, {strides, dimensions}, options)};
}

CANN_API AclScalar* aclCreateScalar(void* value, int type) {
  return new AclScalar{at::from_blob(value, {}, at::TensorOptions(scalar_type(type))).item()};
}

CANN_API AclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) {
  return new AclIntArray(values, values + count);
}

CANN_API int aclDestroyTensor(const AclTensor* tensor) {
  delete tensor;
  return 0;
}

CANN_API int aclDestroyScalar(const AclScalar* scalar) {
  delete scalar;
  return 0;
}

CANN_API int aclDestroyIntArray(const AclIntArray* array) {
  delete array;
  return 0;
}

ACLNN(InplaceZero)(AclTensor* self, uint64_t* workspace_bytes, Executor** executor) {
  return prepare(workspace_bytes, executor, [self = self->tensor] { self.zero_(); });
}

ACLNN(InplaceOne)(AclTensor* self, uint64_t* workspace_bytes, Executor** executor) {
  return prepare(workspace_bytes, executor, [self = self->tensor] { self.fill_(1); });
}

ACLNN(InplaceFillScalar)(AclTensor* self, AclScalar* value, uint64_t* workspace_bytes, Executor** executor) {
  return prepare(workspace_bytes, executor, [self = self->tensor, value = value->scalar] { self.fill_(value); });
}

ACLNN(InplaceCopy)(AclTensor* self, AclTensor* source, uint64_t* workspace_bytes, Executor** executor) {
  return prepare(workspace_bytes, executor, [self = self->tensor, from = source->tensor] { self.copy_(from); });
}

ACLNN(Cast)(AclTensor* self, int, AclTensor* out, uint64_t* workspace_bytes, Executor** executor) {
  return prepare(workspace_bytes, executor, [out = out->tensor, self = self->tensor] { out.copy_(self); });
}

ACLNN(ConstantPadNd)(AclTensor* self, AclIntArray* padding, AclScalar* value, AclTensor* out, uint64_t* workspace_bytes,
                     Executor** executor) {
  auto pad = [self = self->tensor, out = out->tensor, padding = *padding, value = value->scalar] {
    out.copy_(at::constant_pad_nd(self, padding, value));
  };
  return prepare(workspace_bytes, executor, pad);
}
