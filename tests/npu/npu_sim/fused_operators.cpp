// torch_npu's own operators that language models use, as compositions of torch's: so they are differentiable, and what
// the chip refuses is refused inside. For tests only; not Huawei software. Any other one raises NotImplementedError.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "simulated.h"

namespace npu_sim {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalLengths = at::OptionalIntArrayRef;

void only_common_floats(const char* name, const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, "call aclnn", name,
              " failed, detail:EZ1001: self not implemented for ", c10::toString(type),
              ", should be in dtype support list [DT_FLOAT16,DT_FLOAT,DT_BFLOAT16,]. [npu-sim: ", chip().name, "]");
}

void only_transformer_chips(const char* name) {
  TORCH_CHECK(chip().transformer, "call aclnn", name, " failed, detail:EZ9999: ", name, " is not supported on ",
              chip().name, " (Atlas A2 and A3 have it). [npu-sim]");
}

// ---------------------------------------------------------------- norms, activations, rotary embedding

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& gamma, double epsilon) {
  only_common_floats("RmsNorm", x);
  const auto wide = x.to(at::kFloat);
  const auto rstd = at::rsqrt(wide.pow(2).mean(-1, /*keepdim=*/true) + epsilon);
  return {(wide * rstd).to(x.scalar_type()) * gamma, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x1, const Tensor& x2, const Tensor& gamma,
                                                double epsilon) {
  const auto sum = x1 + x2;
  auto [y, rstd] = rms_norm(sum, gamma, epsilon);
  return {y, rstd, sum};
}

Tensor swiglu(const Tensor& x, int64_t dim) {
  only_transformer_chips("SwiGlu");
  only_common_floats("SwiGlu", x);
  TORCH_CHECK(x.size(dim) % 2 == 0, "npu_swiglu: the size of dim ", dim, " must be even, it is ", x.size(dim));
  const auto halves = x.chunk(2, dim);
  return at::silu(halves[0]) * halves[1];
}

Tensor rotary_mul(const Tensor& x, const Tensor& cos, const Tensor& sin, c10::string_view mode, const OptionalTensor&) {
  only_common_floats("RotaryPositionEmbedding", x);
  TORCH_CHECK(x.dim() == 4 && cos.dim() == 4 && sin.dim() == 4,
              "npu_rotary_mul: input, r1 and r2 must have 4 dimensions");
  if (mode == "interleave") {
    only_transformer_chips("RotaryPositionEmbedding");
    const auto pairs = x.unflatten(-1, {-1, 2});
    const auto turned = at::stack({-pairs.select(-1, 1), pairs.select(-1, 0)}, -1).flatten(-2);
    return x * cos + turned * sin;
  }
  TORCH_CHECK(mode == "half", "npu_rotary_mul: rotary_mode must be half or interleave");
  const auto halves = x.chunk(2, -1);
  return x * cos + at::cat({-halves[1], halves[0]}, -1) * sin;
}

Tensor silu(const Tensor& x) { return at::silu(x); }
Tensor fast_gelu(const Tensor& x) { return x * at::sigmoid(x * 1.702); }
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) { return at::linear(x, weight, bias); }

Tensor dtype_cast(const Tensor& x, int64_t type, std::optional<int64_t>) {
  return x.to(static_cast<c10::ScalarType>(type));
}

Tensor internal_dtype_cast(const Tensor& x, c10::ScalarType type) { return x.to(type); }  // ProcessGroupHCCL: bool

// ---------------------------------------------------------------- fused attention

struct Attention {
  int64_t heads, sparse_mode;
  double scale, keep_prob;
  OptionalTensor mask;

  // True where a key is hidden from a query; nothing when every key is visible. Without atten_mask the kernel ignores
  // sparse_mode and computes full attention: a caller who forgets the mask gets no causal one.
  OptionalTensor hidden(const Tensor& scores) const {
    if (!mask) return std::nullopt;
    const int64_t queries = scores.size(-2), keys = scores.size(-1);
    const auto options = scores.options().dtype(at::kBool);
    if (sparse_mode == 2) return at::ones({queries, keys}, options).triu(1);                   // left-up causal
    if (sparse_mode == 3) return at::ones({queries, keys}, options).triu(1 + keys - queries);  // right-down causal
    return mask->slice(-2, 0, queries).slice(-1, 0, keys).to(at::kBool);
  }

  // [B, N, S, D] each; key and value may have fewer heads.
  Tensor operator()(const Tensor& query, Tensor key, Tensor value) const {
    TORCH_CHECK(query.size(1) == heads, "npu_fusion_attention: head_num is ", heads, ", query has ", query.size(1));
    TORCH_CHECK(key.size(1) && query.size(1) % key.size(1) == 0,
                "npu_fusion_attention: the heads of query must be a multiple of those of key");
    const int64_t groups = query.size(1) / key.size(1);
    if (groups > 1) {
      key = key.repeat_interleave(groups, 1);
      value = value.repeat_interleave(groups, 1);
    }
    auto scores = at::matmul(query.to(at::kFloat), key.to(at::kFloat).transpose(-1, -2)) * scale;
    const auto hide = hidden(scores);
    if (hide) scores = scores.masked_fill(*hide, std::numeric_limits<float>::lowest());
    auto weights = at::softmax(scores, -1);
    if (hide) weights = weights.masked_fill(*hide, 0);  // a query that sees no key gets zeros
    if (keep_prob < 1) weights = at::dropout(weights, 1 - keep_prob, /*train=*/true);
    return at::matmul(weights, value.to(at::kFloat)).to(query.scalar_type());
  }
};

// [B, S, N * D] -> [B, N, S, D]
Tensor split_heads(const Tensor& tensor, int64_t width) { return tensor.unflatten(-1, {-1, width}).transpose(1, 2); }

// Layout TND: sequences one behind the other, lengths as cumulative sums.
Tensor attend_packed(const Attention& attend, const Tensor& query, const Tensor& key, const Tensor& value,
                     OptionalLengths query_ends, OptionalLengths key_ends) {
  TORCH_CHECK(query_ends && key_ends && query_ends->size() == key_ends->size(),
              "npu_fusion_attention: layout TND needs actual_seq_qlen and actual_seq_kvlen of the same length");
  const auto cut = [](const Tensor& tensor, int64_t begin, int64_t end) {
    return tensor.slice(0, begin, end).transpose(0, 1).unsqueeze(0);
  };
  std::vector<Tensor> parts;
  int64_t query_begin = 0, key_begin = 0;
  for (size_t i = 0; i < query_ends->size(); ++i) {
    const int64_t query_end = (*query_ends)[i], key_end = (*key_ends)[i];
    if (query_end == 0 && i > 0) break;  // zeros at the end: sequences that take no part
    TORCH_CHECK(
        query_end >= query_begin && key_end >= key_begin && query_end <= query.size(0) && key_end <= key.size(0),
        "npu_fusion_attention: actual_seq_qlen and actual_seq_kvlen must be cumulative sums within T");
    if (query_end > query_begin)
      parts.push_back(
          attend(cut(query, query_begin, query_end), cut(key, key_begin, key_end), cut(value, key_begin, key_end))
              .squeeze(0)
              .transpose(0, 1));
    query_begin = query_end;
    key_begin = key_end;
  }
  if (query_begin < query.size(0)) parts.push_back(at::zeros_like(query.slice(0, query_begin)));
  return at::cat(parts, 0);
}

void check_attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& pse,
                     const OptionalTensor& mask, double keep_prob, int64_t sparse_mode) {
  only_transformer_chips("FlashAttentionScore");
  only_common_floats("FlashAttentionScore", query);
  TORCH_CHECK(query.scalar_type() == key.scalar_type() && key.scalar_type() == value.scalar_type(),
              "npu_fusion_attention: query, key and value must have the same dtype");
  TORCH_CHECK(keep_prob > 0 && keep_prob <= 1, "npu_fusion_attention: keep_prob must be in (0, 1]");
  TORCH_CHECK(!mask || mask->scalar_type() == at::kBool || mask->scalar_type() == at::kByte,
              "npu_fusion_attention: atten_mask must be bool or uint8 (true hides), it is ",
              c10::toString(mask->scalar_type()));
  TORCH_CHECK_NOT_IMPLEMENTED(!pse, "[npu-sim] npu_fusion_attention: pse is not simulated");
  TORCH_CHECK_NOT_IMPLEMENTED(sparse_mode >= 0 && sparse_mode <= 3, "[npu-sim] npu_fusion_attention: sparse_mode ",
                              sparse_mode, " is not simulated");
  TORCH_CHECK(!mask || sparse_mode < 2 || (mask->size(-1) == 2048 && mask->size(-2) == 2048),
              "npu_fusion_attention: sparse_mode 2, 3 and 4 need the compressed atten_mask of shape (2048, 2048)");
}

using AttentionResult = std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, int64_t, int64_t>;

AttentionResult fusion_attention(const Tensor& query, const Tensor& key, const Tensor& value, int64_t heads,
                                 c10::string_view layout, const OptionalTensor& pse, const OptionalTensor&,
                                 const OptionalTensor& mask, double scale, double keep_prob, int64_t, int64_t, int64_t,
                                 OptionalLengths, OptionalLengths query_ends, OptionalLengths key_ends,
                                 int64_t sparse_mode, bool, bool, c10::string_view, const OptionalTensor&,
                                 const OptionalTensor&, int64_t, int64_t) {
  check_attention(query, key, value, pse, mask, keep_prob, sparse_mode);
  const Attention attend{heads, sparse_mode, scale, keep_prob, mask};
  Tensor out;
  if (layout == "BNSD") {
    out = attend(query, key, value);
  } else if (layout == "BSND") {
    out = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2);
  } else if (layout == "BSH") {
    const int64_t width = query.size(2) / heads;
    out = attend(split_heads(query, width), split_heads(key, width), split_heads(value, width))
              .transpose(1, 2)
              .flatten(-2);
  } else if (layout == "SBH") {
    const int64_t width = query.size(2) / heads;
    const auto split = [&](const Tensor& tensor) { return split_heads(tensor.transpose(0, 1), width); };
    out = attend(split(query), split(key), split(value)).transpose(1, 2).flatten(-2).transpose(0, 1);
  } else if (layout == "TND") {
    out = attend_packed(attend, query, key, value, query_ends, key_ends);
  } else {
    TORCH_CHECK(false, "npu_fusion_attention: unknown input_layout ", layout);
  }
  const auto unused = at::empty({0}, query.options().dtype(at::kFloat));  // what the real backward keeps
  return {out.contiguous(), unused, unused, unused, 0, 0, 0};
}

// ---------------------------------------------------------------- AdamW of torch_npu.optim

std::tuple<Tensor, Tensor, Tensor> apply_adam_w(const at::Scalar& beta1_power, const at::Scalar& beta2_power,
                                                const at::Scalar& rate, const at::Scalar& decay,
                                                const at::Scalar& beta1, const at::Scalar& beta2,
                                                const at::Scalar& epsilon, const Tensor& gradient,
                                                const OptionalTensor&, std::optional<bool>,
                                                std::optional<bool> maximize, at::TensorList out) {
  auto weight = out[0], mean = out[1], variance = out[2];
  const auto descent = maximize.value_or(false) ? -gradient : gradient;
  const double b1 = beta1.toDouble(), b2 = beta2.toDouble();
  weight.mul_(1 - rate.toDouble() * decay.toDouble());
  mean.mul_(b1).add_(descent, 1 - b1);
  variance.mul_(b2).addcmul_(descent, descent, 1 - b2);
  const auto denominator = (variance / (1 - beta2_power.toDouble())).sqrt_().add_(epsilon.toDouble());
  weight.addcdiv_(mean, denominator, -rate.toDouble() / (1 - beta1_power.toDouble()));
  return {weight, mean, variance};
}

// ---------------------------------------------------------------- the overflow flag

Tensor alloc_float_status(const Tensor& like) { return at::zeros_like(like); }
Tensor get_float_status(const Tensor& like, int64_t) { return at::full_like(like, overflow_flag ? 1.0 : 0.0); }

Tensor clear_float_status(const Tensor& like, int64_t) {
  overflow_flag = false;
  return at::zeros_like(like);
}

// A composition as one operator: autocast, which a real kernel would not see, stays outside.
template <class Function, Function* function>
struct Composed;
template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Composed<Result(Arguments...), function> {
  static Result run(Arguments... arguments) {
    c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
    return function(std::forward<Arguments>(arguments)...);
  }
};
#define COMPOSED(function) TORCH_FN((Composed<decltype(function), function>::run))

}  // namespace

void install_fused_operators() {
  using c10::DispatchKey;
  const auto open = [](DispatchKey key) {
    return new torch::Library(torch::Library::IMPL, "npu", key, __FILE__, __LINE__);
  };
  static torch::Library* const kernels = open(DispatchKey::PrivateUse1);
  static torch::Library* const formulas = open(DispatchKey::AutogradPrivateUse1);
  const auto compose = [&](const char* name, auto function) {
    kernels->impl(name, function);
    formulas->impl(name, function);  // autograd goes through the composition
  };
  compose("npu_rms_norm", COMPOSED(rms_norm));
  compose("npu_add_rms_norm", COMPOSED(add_rms_norm));
  compose("npu_swiglu", COMPOSED(swiglu));
  compose("npu_rotary_mul", COMPOSED(rotary_mul));
  compose("npu_silu", COMPOSED(silu));
  compose("npu_linear", COMPOSED(linear));
  compose("fast_gelu", COMPOSED(fast_gelu));
  compose("npu_dtype_cast", COMPOSED(dtype_cast));
  compose("_npu_dtype_cast", COMPOSED(internal_dtype_cast));
  compose("npu_fusion_attention", COMPOSED(fusion_attention));
  kernels->impl("npu_apply_adam_w.out", TORCH_FN(apply_adam_w));
  kernels->impl("npu_alloc_float_status", TORCH_FN(alloc_float_status));
  kernels->impl("npu_get_float_status", TORCH_FN(get_float_status));
  kernels->impl("npu_clear_float_status", TORCH_FN(clear_float_status));
}

}  // namespace npu_sim
