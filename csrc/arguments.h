// What the bindings of all devices share: torch's types under short names, and the checks of arguments that
// do not depend on the device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "types.h"

// Arguments of the ops behind their outputs, in the language of torch's schemas: those of
// effnet_kernels::<op>, less the backend.
#define EFFNET_WINDOW "int[] stride, int[] padding"
#define EFFNET_POINTWISE_CONV_BN_ACT \
  "Tensor x, Tensor weight, Tensor[] bn, float eps, str act, Tensor? gate, Tensor? residual, bool pool"
#define EFFNET_DEPTHWISE_CONV_BN_ACT \
  "Tensor x, Tensor weight, Tensor[] bn, float eps, " EFFNET_WINDOW ", str act, bool with_mean"
#define EFFNET_SQUEEZE_EXCITE_GATE "Tensor mean, Tensor[] se, str act, str gate"
#define EFFNET_SQUEEZE_EXCITE "Tensor x, Tensor[] se, str act, str gate"
#define EFFNET_FUSED_MBCONV                                         \
  "Tensor x, Tensor weight, Tensor[] bn, float eps, " EFFNET_WINDOW \
  ", str act, Tensor? project_weight, Tensor[] project_bn, float project_eps, bool residual"
#define EFFNET_EXPAND_DEPTHWISE                                                            \
  "Tensor x, Tensor? expand_weight, Tensor[] expand_bn, float expand_eps, Tensor weight, " \
  "Tensor[] bn, float eps, " EFFNET_WINDOW ", str act"
#define EFFNET_MBCONV                                                                    \
  EFFNET_EXPAND_DEPTHWISE                                                                \
  ", Tensor[] se, str se_act, str se_gate, Tensor project_weight, Tensor[] project_bn, " \
  "float project_eps, str project_act, bool residual"
// The gradient that effnet_kernels/ops/train_block.py describes.
#define EFFNET_GRADIENT "Tensor? grad, Tensor? raw, Tensor norm, str act, Tensor? gate, Tensor? bias"

namespace effnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline int act_code(const char* name, const std::string& act) {
  for (int code = 0; code <= kHardsigmoid; ++code)
    if (act == kActNames[code]) return code;
  STD_TORCH_CHECK(false, name, " is no activation that the kernels know: ", act);
  return kIdentity;
}

inline DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
      return DType::kFloat32;
  }
}

inline int64_t first_size(const Tensor& t) { return t.dim() > 0 ? t.size(0) : 0; }

inline void check_dim(const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
}

inline void check_sizes(const char* name, const Tensor& t, Sizes sizes) {
  check_dim(name, t, static_cast<int64_t>(sizes.size()));
  for (int64_t i = 0; i < t.dim(); ++i)
    STD_TORCH_CHECK(t.size(i) == sizes[i], name, " must have size ", sizes[i], " in dimension ", i, ", got ",
                    t.size(i));
}

// Of a tensor with 4 dimensions.
inline void check_nhwc(const char* name, const Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  STD_TORCH_CHECK(t.stride(0) == h * w * c && t.stride(1) == 1 && t.stride(2) == w * c && t.stride(3) == c,
                  name, " must be dense in [N, H, W, C] memory");
}

// Memory of contiguous float32 numbers.
inline float* fp32(const char* name, const Tensor& t, Sizes sizes) {
  check_sizes(name, t, sizes);
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == ScalarType::Float, name,
                  " must be contiguous float32");
  return static_cast<float*>(t.data_ptr());
}

inline void check_batch_norm(const char* name, const Tensors& bn) {
  STD_TORCH_CHECK(bn.size() == 4, name, " must be gamma, beta, running_mean, running_var; got ", bn.size(),
                  " tensors");
}

// The hidden channels of squeeze-and-excitation.
inline int64_t check_squeeze_excite(const Tensors& se) {
  STD_TORCH_CHECK(se.size() == 4, "se must be w_reduce, b_reduce, w_expand, b_expand; got ", se.size(),
                  " tensors");
  return first_size(se[0]);
}

// Rows and columns of what a window makes of a map; x and weight: [.., .., rows, columns].
inline std::array<int64_t, 2> window_result(Sizes x, Sizes weight, Sizes stride, Sizes padding) {
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0,
                  "stride must be two positive numbers");
  STD_TORCH_CHECK(padding.size() == 4, "padding must be top, bottom, left, right");
  for (int64_t p : padding)
    STD_TORCH_CHECK(p >= 0 && p < (1 << 30), "padding must not be negative nor exceed 2^30, got ", p);
  std::array<int64_t, 2> result;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t kernel = weight[2 + axis];
    const int64_t room = x[2 + axis] + padding[2 * axis] + padding[2 * axis + 1] - kernel;
    STD_TORCH_CHECK(kernel > 0 && room >= 0, "weight must fit the padded map");
    result[axis] = room / stride[axis] + 1;
  }
  return result;
}

}  // namespace effnet
