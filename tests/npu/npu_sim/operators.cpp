// Operators of the simulated NPU. For tests only; not Huawei software.
//
// torch_npu registers about 1,500 kernels in torch's dispatcher under PrivateUse1. Those that compute would call CANN;
// they are replaced here by one boxed kernel that runs torch's own CPU kernel on aliases of the same memory (device
// memory is host memory) and copies the results into memory of torch_npu's allocator. What makes, resizes and views
// tensors stays torch_npu's own, and so do its allocator, autocast, generators, serialization and error texts.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/StorageImpl.h>
#include <torch/library.h>

#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "simulated.h"

namespace npu_sim {
namespace {

using c10::DispatchKey;
using torch::jit::Stack;
using Names = std::unordered_set<std::string>;
constexpr auto kNpu = c10::DeviceType::PrivateUse1;

// torch_npu's own kernels stay for these: they handle memory, storages and views.
const Names kKeptAten{
    "empty.memory_format",
    "empty_strided",
    "empty_with_format",
    "unsafe_empty_with_format",
    "new_empty_strided",
    "empty_like",
    "as_strided",
    "as_strided_",
    "view",
    "_reshape_alias",
    "resize_",
    "resize_as_",
    "set_",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
    "is_set_to",
    "is_pinned",
    "_pin_memory",
    "record_stream",
    "squeeze",
    "squeeze.dim",
    "squeeze_",
    "unsqueeze",
    "unsqueeze_",
    "unfold",
    "alias",
    "view_as_real",
    "view_as_complex",
    "_lazy_clone",
    "t",
    "transpose.int",
    "_to_copy",
};
const Names kKeptNpu{
    "copy_memory_",
    "empty_with_format",
    "get_npu_format",
    "get_storage_size",
    "npu_change_data_ptr",
    "npu_format_cast",
    "npu_format_cast.Tensor",
    "npu_format_cast_",
    "npu_format_cast_.acl_format",
    "_npu_format_cast",
    "_npu_format_cast.aclnn",
    "_npu_format_cast.input_dtype",
    "_npu_distribute_barrier",
    "set_op_timeout_ms",
};

// These take float32, float16 and bfloat16 and nothing else (CANN's manual of its aclnn operators).
const Names kFloatOnly{
    "aten::mm",
    "aten::bmm",
    "aten::addmm",
    "aten::baddbmm",
    "aten::addbmm",
    "aten::dot",
    "aten::mv",
    "aten::addmv",
    "aten::convolution",
    "aten::convolution_overrideable",
    "aten::_convolution",
    "aten::native_layer_norm",
    "aten::gelu",
    "aten::silu",
    "aten::nll_loss_forward",
    "aten::nll_loss2d_forward",
};

// These take CPU tensors beside NPU tensors, as torch_npu's kernels do.
const Names kTakeCpuTensors{
    "aten::index",          "aten::index_put_", "aten::_index_put_impl_", "aten::index_put",
    "aten::_foreach_copy_", "aten::resize_as_", "aten::normal",
};

// ---------------------------------------------------------------- what this chip refuses

bool is_float8(c10::ScalarType type) {
  return type == at::kFloat8_e4m3fn || type == at::kFloat8_e5m2 || type == at::kFloat8_e4m3fnuz ||
         type == at::kFloat8_e5m2fnuz;
}

std::string cann_name(c10::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return "DT_FLOAT16";
    case at::kBFloat16:
      return "DT_BFLOAT16";
    case at::kDouble:
      return "DT_DOUBLE";
    case at::kByte:
      return "DT_UINT8";
    case at::kChar:
      return "DT_INT8";
    case at::kShort:
      return "DT_INT16";
    case at::kInt:
      return "DT_INT32";
    case at::kLong:
      return "DT_INT64";
    default: {
      std::string name = std::string("DT_") + c10::toString(type);
      for (char& letter : name) letter = static_cast<char>(toupper(letter));
      return name;
    }
  }
}

// "aten::nll_loss_forward" -> "aclnnNllLossForward"
std::string aclnn_name(const std::string& operator_name) {
  std::string name = "aclnn";
  bool capital = true;
  const size_t colons = operator_name.rfind(':');
  for (const char letter : operator_name.substr(colons == std::string::npos ? 0 : colons + 1)) {
    if (letter != '_') name += static_cast<char>(capital ? toupper(letter) : letter);
    capital = letter == '_';
  }
  return name;
}

[[noreturn]] void refuse(const std::string& operator_name, c10::ScalarType type, const char* supported) {
  TORCH_CHECK(false, "call ", aclnn_name(operator_name), " failed, detail:EZ1001: self not implemented for ",
              cann_name(type), ", should be in dtype support list [", supported, "]. [npu-sim: ", chip().name, "]");
  __builtin_unreachable();
}

void refuse_missing_type(const std::string& operator_name, c10::ScalarType type) {
  if ((type == at::kBFloat16 && !chip().bfloat16) || (is_float8(type) && !chip().float8))
    refuse(operator_name, type,
           chip().bfloat16 ? "DT_FLOAT16,DT_FLOAT,DT_DOUBLE,DT_INT8,DT_UINT8,DT_INT16,DT_INT32,DT_INT64,DT_BOOL,"
                             "DT_COMPLEX64,DT_COMPLEX128,DT_BFLOAT16,"
                           : "DT_FLOAT16,DT_FLOAT,DT_DOUBLE,DT_INT8,DT_UINT8,DT_INT16,DT_INT32,DT_INT64,DT_BOOL,"
                             "DT_COMPLEX64,DT_COMPLEX128,");
}

bool is_common_float(c10::ScalarType type) { return type == at::kFloat || type == at::kHalf || type == at::kBFloat16; }

void refuse_input_type(const std::string& operator_name, c10::ScalarType type) {
  refuse_missing_type(operator_name, type);
  const bool index = type == at::kLong || type == at::kInt || type == at::kByte;  // the target of nll_loss
  if (kFloatOnly.count(operator_name) && !is_common_float(type) &&
      !(index && operator_name.rfind("aten::nll_loss", 0) == 0))
    refuse(operator_name, type, "DT_FLOAT16,DT_FLOAT,DT_BFLOAT16,");
}

// ---------------------------------------------------------------- CPU aliases of NPU tensors

c10::Device current_device() { return c10::impl::getDeviceGuardImpl(kNpu)->getDevice(); }

at::Tensor cpu_alias(const at::Tensor& tensor) {
  const auto& storage = tensor.storage();
  auto alias_storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
      at::DataPtr(storage.mutable_data(), c10::Device(c10::kCPU)), c10::GetAllocator(c10::kCPU), /*resizable=*/true);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(std::move(alias_storage), c10::DispatchKeySet(DispatchKey::CPU),
                                                        tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) alias._set_conj(true);
  if (tensor.is_neg()) alias._set_neg(true);
  return alias;
}

at::Tensor on_cpu(const at::Tensor& tensor) { return tensor.device().type() == kNpu ? cpu_alias(tensor) : tensor; }

// ---------------------------------------------------------------- random numbers
// They come from the NPU generator's seed and offset, and the CPU generator stays where it was.

uint64_t next_seed(at::Generator generator) {
  const uint64_t offset = generator.get_offset();
  generator.set_offset(offset + 4);  // Philox draws four numbers at a time
  uint64_t hash = generator.current_seed() + 0x9E3779B97F4A7C15ull * (offset + 1);
  hash = (hash ^ (hash >> 30)) * 0xBF58476D1CE4E5B9ull;
  hash = (hash ^ (hash >> 27)) * 0x94D049BB133111EBull;
  return hash ^ (hash >> 31);
}

bool takes_generator(const c10::Argument& argument) {
  const auto& type = argument.type();
  if (type->kind() == c10::TypeKind::GeneratorType) return true;
  const auto optional = type->cast<c10::OptionalType>();
  return optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

// For operators that take no generator, like native_dropout: the default CPU generator, for a moment in another state.
class BorrowedCpuGenerator {
 public:
  explicit BorrowedCpuGenerator(uint64_t seed) : lock_(mutex()), saved_(generator()->clone()) {
    set(at::mt19937(seed), {}, {});
  }
  ~BorrowedCpuGenerator() {
    set(saved_->engine(), saved_->next_float_normal_sample(), saved_->next_double_normal_sample());
  }

 private:
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static at::CPUGeneratorImpl* generator() {
    return at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
  }
  static void set(at::mt19937 engine, std::optional<float> float_sample, std::optional<double> double_sample) {
    generator()->set_engine(engine);
    generator()->set_next_float_normal_sample(float_sample);
    generator()->set_next_double_normal_sample(double_sample);
  }
  std::lock_guard<std::mutex> lock_;
  std::shared_ptr<at::CPUGeneratorImpl> saved_;
};

// ---------------------------------------------------------------- overflow on a chip that saturates
// An operator that makes an infinity out of finite numbers gives +-max instead and raises the flag.

bool has_infinity(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.device().is_cpu() || !tensor.numel()) return false;
  if (tensor.scalar_type() != at::kHalf && tensor.scalar_type() != at::kFloat) return false;
  if (!tensor.is_non_overlapping_and_dense()) return at::isinf(tensor).any().item<bool>();
  const int64_t count = tensor.numel();
  if (tensor.scalar_type() == at::kHalf) {
    const auto* bits = static_cast<const uint16_t*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < count; ++i)
      if ((bits[i] & 0x7fff) == 0x7c00) return true;
  } else {
    const auto* bits = static_cast<const uint32_t*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < count; ++i)
      if ((bits[i] & 0x7fffffff) == 0x7f800000) return true;
  }
  return false;
}

bool has_infinity(const c10::IValue& value) {
  if (value.isDouble()) return std::isinf(value.toDouble());
  if (value.isScalar()) return value.toScalar().isFloatingPoint() && std::isinf(value.toScalar().toDouble());
  if (value.isTensor()) return has_infinity(value.toTensor());
  if (!value.isTensorList()) return false;
  for (const at::Tensor& tensor : value.toTensorVector())
    if (has_infinity(tensor)) return true;
  return false;
}

void saturate(at::Tensor tensor) {
  if (!has_infinity(tensor)) return;
  const double largest = tensor.scalar_type() == at::kHalf ? 65504.0 : 3.4028234663852886e38;
  tensor.clamp_(-largest, largest);
  overflow_flag = true;
}

// ---------------------------------------------------------------- NPU_SIM_OPS=FILE: how often each operator ran

class Counter {
 public:
  void hit(const std::string& name) {
    if (!path_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    ++hits_[name];
  }
  ~Counter() {
    FILE* file = path_ ? fopen(path_, "a") : nullptr;
    if (!file) return;
    for (const auto& [name, count] : hits_) fprintf(file, "%zu %s\n", count, name.c_str());
    fclose(file);
  }

 private:
  const char* path_ = getenv("NPU_SIM_OPS");
  std::mutex mutex_;
  std::unordered_map<std::string, size_t> hits_;
};

Counter& counter() {
  static Counter one;
  return one;
}

// ---------------------------------------------------------------- the boxed kernel

// One operator call: its tensors as NPU tensors and as CPU aliases.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : op_(op), schema_(op.schema()), name_(op.operator_name().name), stack_(stack) {}

  void run() {
    take_arguments();
    check_devices();
    counter().hit(toString(op_.operator_name()));
    const bool finite_before = chip().saturates && !any_infinity(arguments_begin(), schema_.arguments().size());
    compute();
    if (finite_before) saturate_results();
    store_resized_outputs();
    if (device_->type() == kNpu) return_npu_tensors();
  }

 private:
  struct Argument {
    at::Tensor npu, cpu;
    const void* memory;  // of the alias before the call: an out= argument may be given other memory
    bool written;
  };

  size_t arguments_begin() const { return stack_->size() - schema_.arguments().size(); }
  size_t returns_begin() const { return stack_->size() - schema_.returns().size(); }

  bool any_infinity(size_t begin, size_t count) const {
    for (size_t i = begin; i < begin + count; ++i)
      if (has_infinity((*stack_)[i])) return true;
    return false;
  }

  at::Tensor take(const at::Tensor& tensor, bool written) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != kNpu) {
      cpu_tensor_ |= tensor.device().is_cpu() && tensor.dim() > 0;
      return tensor;
    }
    refuse_input_type(name_, tensor.scalar_type());
    const bool scalars = tensor.dim() == 0 || arguments_.empty() || arguments_.front().npu.dim() == 0;
    TORCH_CHECK(!device_ || scalars || tensor.device() == *device_,
                "Expected all tensors to be on the same device, but found at least two devices, ", device_->str(),
                " and ", tensor.device().str(), "! (", name_, ")");
    if (!device_ || tensor.dim() > 0) device_ = tensor.device();
    const auto alias = cpu_alias(tensor);
    arguments_.push_back({tensor, alias, alias.storage().data(), written});
    return alias;
  }

  void take_arguments() {
    for (size_t i = 0; i < schema_.arguments().size(); ++i) {
      const c10::Argument& argument = schema_.arguments()[i];
      c10::IValue& value = (*stack_)[arguments_begin() + i];
      const bool written = argument.alias_info() && argument.alias_info()->isWrite();
      if (value.isTensor()) {
        value = take(value.toTensor(), written);
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> aliases;
        for (const at::Tensor& tensor : value.toTensorVector()) aliases.push_back(take(tensor, written));
        value = std::move(aliases);
      } else if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> aliases;
        for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
          aliases.push_back(tensor ? std::optional<at::Tensor>(take(*tensor, written)) : std::nullopt);
        value = std::move(aliases);
      } else if (value.isDevice()) {
        target_ = value.toDevice();  // may be the CPU: zeros_like(npu_tensor, device="cpu")
        if (target_->type() == kNpu && !target_->has_index()) target_ = current_device();
        value = c10::Device(c10::kCPU);
      } else if (takes_generator(argument)) {
        generator_argument_ = &value;
        if (value.isGenerator()) generator_ = value.toGenerator();
      } else if (value.isInt() && argument.name() == "dtype") {
        refuse_missing_type(name_, static_cast<c10::ScalarType>(value.toInt()));
      }
    }
  }

  void check_devices() {
    if (target_) device_ = target_;
    if (!device_) device_ = current_device();
    TORCH_CHECK(!cpu_tensor_ || arguments_.empty() || kTakeCpuTensors.count(name_),
                "Expected all tensors to be on the same device, but found at least two devices, ", device_->str(),
                " and cpu! (", name_, ")");
    TORCH_CHECK(!generator_ || generator_->device().type() == kNpu,
                "Expected a 'npu' device type for generator but found 'cpu'");
  }

  void compute() {
    std::optional<BorrowedCpuGenerator> borrowed;
    if (device_->type() == kNpu && (generator_ || op_.hasTag(at::Tag::nondeterministic_seeded))) {
      const uint64_t seed = next_seed(generator_ ? *generator_ : at::globalContext().defaultGenerator(*device_));
      if (generator_argument_)
        *generator_argument_ = at::make_generator<at::CPUGeneratorImpl>(seed);
      else
        borrowed.emplace(seed);
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    op_.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack_);
  }

  void saturate_results() {
    for (size_t i = returns_begin(); i < stack_->size(); ++i) {
      const c10::IValue& value = (*stack_)[i];
      if (value.isTensor()) saturate(value.toTensor());
      if (value.isTensorList())
        for (const at::Tensor& tensor : value.toTensorVector()) saturate(tensor);
    }
    for (Argument& argument : arguments_)
      if (argument.written) saturate(argument.cpu);
  }

  void store_resized_outputs() {
    for (Argument& argument : arguments_) {
      if (!argument.written) continue;
      const bool moved = argument.cpu.storage().data() != argument.memory;
      if (moved) {
        argument.npu.resize_(argument.cpu.sizes());
        cpu_alias(argument.npu).copy_(argument.cpu);
      } else if (argument.cpu.sizes() != argument.npu.sizes() || argument.cpu.strides() != argument.npu.strides()) {
        argument.npu.unsafeGetTensorImpl()->set_sizes_and_strides(argument.cpu.sizes(), argument.cpu.strides(),
                                                                  argument.npu.storage_offset());
      }
    }
  }

  at::Tensor to_npu(const at::Tensor& result) {
    if (!result.defined() || !result.device().is_cpu()) return result;
    const void* memory = result.storage().data();
    for (const Argument& argument : arguments_) {
      if (argument.cpu.unsafeGetTensorImpl() == result.unsafeGetTensorImpl()) return argument.npu;
      if (memory && memory == argument.memory)  // a view of an input
        return argument.npu.as_strided(result.sizes(), result.strides(), result.storage_offset());
    }
    refuse_missing_type(name_, result.scalar_type());
    auto copy = at::empty_strided(result.sizes(), result.strides(), result.options().device(*device_));
    if (!result.numel()) return copy;
    if (result.is_non_overlapping_and_dense())
      memcpy(copy.mutable_data_ptr(), result.const_data_ptr(), result.nbytes());
    else
      cpu_alias(copy).copy_(result);
    return copy;
  }

  void return_npu_tensors() {
    for (size_t i = returns_begin(); i < stack_->size(); ++i) {
      c10::IValue& value = (*stack_)[i];
      if (value.isTensor()) {
        value = to_npu(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> results;
        for (const at::Tensor& tensor : value.toTensorVector()) results.push_back(to_npu(tensor));
        value = std::move(results);
      }
    }
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  const std::string& name_;
  Stack* stack_;
  std::deque<Argument> arguments_;
  std::optional<c10::Device> device_, target_;
  std::optional<at::Generator> generator_;
  c10::IValue* generator_argument_ = nullptr;
  bool cpu_tensor_ = false;
};

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(); }

void decompose(const c10::OperatorHandle& op, Stack* stack) {
  op.callBoxedForDispatchKey(DispatchKey::CompositeImplicitAutograd, *stack);
}

// torch_npu has autograd kernels of its own for some operators, which call CANN: torch's formulas take their place.
void differentiate(const c10::OperatorHandle& op, Stack* stack) {
  op.callBoxedForDispatchKey(DispatchKey::Autograd, *stack);
}

void not_simulated(const c10::OperatorHandle& op, Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "[npu-sim] ", op.operator_name(),
                              " is an operator of torch_npu that is not simulated");
}

// ---------------------------------------------------------------- operators with a kernel of their own

const char* copy_direction(const at::Tensor& to, const at::Tensor& from) {
  if (to.device().type() != kNpu) return "copy_ npu->cpu (synchronizes)";
  return from.device().type() != kNpu ? "copy_ cpu->npu" : "copy_ npu->npu";
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool) {
  if (self.scalar_type() != source.scalar_type()) {  // bytes of a missing type may be moved, but not cast
    refuse_missing_type("Cast", self.scalar_type());
    refuse_missing_type("Cast", source.scalar_type());
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  auto to = on_cpu(self);
  const auto from = on_cpu(source);
  to.copy_(from);
  const bool cast_to_half = to.scalar_type() == at::kHalf && from.scalar_type() != at::kHalf;
  if (chip().saturates && cast_to_half && source.device().type() == kNpu && !has_infinity(from)) saturate(to);
  counter().hit(copy_direction(self, source));
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& self) {
  self.resize_(source.sizes());
  at::Tensor to = self;
  copy_(to, source, false);
  return self;
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  counter().hit("aten::_local_scalar_dense (item(): synchronizes)");
  return at::_local_scalar_dense(cpu_alias(self));
}

at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  counter().hit("aten::histc");  // the CPU kernel takes no integers, the NPU's does
  return at::histc(cpu_alias(self).to(at::kFloat), bins, low, high).to(self.scalar_type()).to(self.device());
}

// torch's GradScaler on a chip that saturates: the flag says whether a gradient overflowed.
void check_and_unscale(at::TensorList gradients, at::Tensor& found_inf, const at::Tensor& inverse_scale) {
  if (overflow_flag.exchange(false)) found_inf.fill_(1.0);
  for (at::Tensor gradient : gradients) gradient.mul_(inverse_scale);
}

// ---------------------------------------------------------------- installation

torch::Library& library(const char* name_space, DispatchKey key) {
  static std::vector<std::unique_ptr<torch::Library>> libraries;  // registrations live as long as these
  libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, name_space, key, __FILE__, __LINE__));
  return *libraries.back();
}

using Kernel = void(const c10::OperatorHandle&, Stack*);
template <Kernel* kernel>
void install(torch::Library& into, const std::string& name) {
  into.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<kernel>());
}

// What torch_npu registered for `key` in a namespace: visit(operator, name with overload).
void each_registration(const std::string& name_space, DispatchKey key,
                       const std::function<void(const c10::OperatorHandle&, const std::string&)>& visit) {
  auto& dispatcher = c10::Dispatcher::singleton();
  const std::string prefix = name_space + "::";
  for (const auto& found : dispatcher.getRegistrationsForDispatchKey(key)) {
    if (found.name.rfind(prefix, 0) != 0) continue;
    const auto op = dispatcher.findSchema(found);
    if (!op) continue;  // a few of its kernels have no schema in this torch
    const std::string overload = found.overload_name.empty() ? "" : "." + found.overload_name;
    visit(*op, found.name.substr(prefix.size()) + overload);
  }
}

void install_aten(torch::Library& aten) {
  const Names own{"copy_", "_copy_from_and_resize", "histc", "_local_scalar_dense"};
  each_registration("aten", DispatchKey::PrivateUse1, [&](const c10::OperatorHandle& op, const std::string& name) {
    if (kKeptAten.count(name) || own.count(name)) return;
    const auto has = [&](DispatchKey key) { return op.hasKernelForDispatchKey(key); };
    if (has(DispatchKey::CompositeImplicitAutograd) && !has(DispatchKey::CPU))
      install<&decompose>(aten, name);
    else if (has(DispatchKey::CPU) || has(DispatchKey::CompositeExplicitAutograd) ||
             has(DispatchKey::CompositeExplicitAutogradNonFunctional))
      install<&run_on_cpu>(aten, name);
    else
      install<&not_simulated>(aten, name);
  });
  aten.impl("copy_", TORCH_FN(copy_));
  aten.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  aten.impl("_local_scalar_dense", TORCH_FN(local_scalar_dense));
  aten.impl("histc", TORCH_FN(histc));
  if (chip().saturates) aten.impl("_amp_foreach_non_finite_check_and_unscale_", TORCH_FN(check_and_unscale));
}

void install_autograd(torch::Library& aten) {
  each_registration("aten", DispatchKey::AutogradPrivateUse1, [&](const auto& op, const std::string& name) {
    if (op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd))
      install<&decompose>(aten, name);
    else if (op.hasKernelForDispatchKey(DispatchKey::Autograd))
      install<&differentiate>(aten, name);
  });
}

struct DropWarnings : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace

void install_operators() {
  DropWarnings drop;  // "overriding a previously registered kernel" is the point
  c10::WarningUtils::WarningHandlerGuard guard(&drop);
  install_aten(library("aten", DispatchKey::PrivateUse1));
  install_autograd(library("aten", DispatchKey::AutogradPrivateUse1));
  auto& npu = library("npu", DispatchKey::PrivateUse1);
  each_registration("npu", DispatchKey::PrivateUse1, [&](const c10::OperatorHandle&, const std::string& name) {
    if (!kKeptNpu.count(name)) install<&not_simulated>(npu, name);
  });
  install_fused_operators();  // puts a composition in the place of some of them
}

}  // namespace npu_sim
