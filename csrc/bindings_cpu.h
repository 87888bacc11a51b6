// What the binding files of the CPU library share: from torch's arguments to those of the kernels, checked.
// The kernels rely on these checks; a call that passes cannot touch memory outside its tensors.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "cpu/common.h"

namespace effnet {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// Torch's threads for one call. Calls that run at the same time, from several threads of the program, share
// them: with all threads each they would be more than the cores. Results do not depend on the number.
class SharedPool : public Pool {
 public:
  SharedPool() {
    threads = std::max(1, static_cast<int>(torch::stable::get_num_threads()) / ++callers);
    run = [](int64_t n, void (*task)(void*, int64_t), void* context) {
      torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) task(context, i);
      });
    };
  }
  ~SharedPool() { --callers; }
  SharedPool(const SharedPool&) = delete;
  SharedPool& operator=(const SharedPool&) = delete;

 private:
  inline static std::atomic<int> callers{0};

  // Of all threads only the one that forks is in the child, and no call forks: calls that ran are none of the
  // child's, where nobody would end them.
  inline static const int kAtFork = pthread_atfork(nullptr, nullptr, [] { callers = 0; });
};

inline SharedPool pool() { return {}; }

inline int act_code(const char* name, const std::string& act) {
  static const char* const names[] = {"identity",  "relu",    "relu6",      "silu",
                                      "hardswish", "sigmoid", "hardsigmoid"};
  for (int code = 0; code <= kHardsigmoid; ++code)
    if (act == names[code]) return code;
  STD_TORCH_CHECK(false, name, " is no activation that the CPU kernels know: ", act);
  return kIdentity;
}

inline DType type_of(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  const auto type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  " must be float32, bfloat16 or float16");
  return type == ScalarType::BFloat16 ? DType::kBFloat16
         : type == ScalarType::Half   ? DType::kFloat16
                                      : DType::kFloat32;
}

inline void* memory(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.data_ptr() != nullptr || t.numel() == 0, name,
                  " has no memory: its storage was released");
  return t.data_ptr();
}

inline Tensor4 tensor4(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, got ", t.dim());
  Tensor4 out{memory(name, t), type_of(name, t), {}, {}};
  for (int i = 0; i < 4; ++i) {
    out.size[i] = t.size(i);
    out.stride[i] = t.stride(i);
  }
  return out;
}

inline void check_size(const char* name, const Tensor4& t, const int64_t (&wanted)[4]) {
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(t.size[i] == wanted[i], name, " must have size ", wanted[i], " in dimension ", i,
                    ", got ", t.size[i]);
}

inline void check_nhwc(const char* name, const Tensor4& t) {
  const int64_t c = t.size[1], h = t.size[2], w = t.size[3];
  STD_TORCH_CHECK(t.stride[0] == h * w * c && t.stride[1] == 1 && t.stride[2] == w * c && t.stride[3] == c,
                  name, " must be dense in [N, H, W, C] memory");
}

inline Tensor4 map(const char* name, const Tensor& t) {
  const Tensor4 out = tensor4(name, t);
  check_nhwc(name, out);
  return out;
}

inline Vector vector(const char* name, const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, name, " must have shape [", size, "]");
  return {memory(name, t), type_of(name, t), t.stride(0)};
}

template <class AnyWeight>  // a tensor, or one that is packed
Window window(const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const Tensor4& x,
              const AnyWeight& weight, const Tensor4& y) {
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0,
                  "stride must be two positive numbers");
  STD_TORCH_CHECK(padding.size() == 4, "padding must be top, bottom, left, right");
  for (int64_t p : padding) STD_TORCH_CHECK(p >= 0, "padding must not be negative, got ", p);
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t room = x.size[2 + axis] + padding[2 * axis] + padding[2 * axis + 1] - weight.size[2 + axis];
    STD_TORCH_CHECK(weight.size[2 + axis] > 0 && room >= 0, "the kernel does not fit the padded map");
    STD_TORCH_CHECK(y.size[2 + axis] == room / stride[axis] + 1, "out has the wrong size in dimension ",
                    2 + axis);
  }
  return {stride[0], stride[1], padding[0], padding[2]};
}

inline bool empty(const Tensor4& t) { return t.size[0] * t.size[1] * t.size[2] * t.size[3] == 0; }

}  // namespace effnet
