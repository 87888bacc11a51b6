// What the binding files of the CUDA library share: the device and stream of a call, and from torch's
// arguments to those of the kernels, checked. The launchers rely on these checks; a call that passes cannot
// touch memory outside its tensors.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <climits>

#include "arguments.h"
#include "cuda/api.h"

namespace effnet::cuda {

// ---- device and stream -----------------------------------------------------------------------------------

inline void check(const char* op, const Status& status) {
  STD_TORCH_CHECK(status.ok(), op, ": ",
                  status.message != nullptr ? status.message : cudaGetErrorString(status.error));
}

inline void check(const char* op, cudaError_t error) { check(op, Status{error, nullptr}); }

// torch's current stream on a device. It comes from torch's CUDA library, which is looked up among those that
// are loaded instead of linked to.
inline cudaStream_t current_stream(int device) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return Function();
    return reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "this build of torch has no CUDA streams");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "torch does not tell its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Makes the device of x current as long as it lives; the stream to launch on. torch's guard knows which
// device a thread has chosen, and makes no context on one that it never used.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x)
      : device_(device_of(x)), guard_(device_), stream_(current_stream(device_)) {
    // This library's own CUDA runtime uses the thread's current context or, if there is none, its own device
    // number.
    int current = 0;
    check("cudaGetDevice", cudaGetDevice(&current));
    if (current != device_) check("cudaSetDevice", cudaSetDevice(device_));
  }

  cudaStream_t stream() const { return stream_; }

  // Bytes of shared memory that a block may ask for.
  int shared_limit() const {
    int bytes = 0;
    check("cudaDeviceGetAttribute",
          cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
    return bytes;
  }

 private:
  static int device_of(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), "x must be on a CUDA device");
    return x.get_device_index();
  }

  const int device_;
  const torch::stable::accelerator::DeviceGuard guard_;
  const cudaStream_t stream_;
};

// ---- arguments -------------------------------------------------------------------------------------------

// Of the tensors of one call: they lie on the device of x, and those that are not fp32 have its dtype.
struct Call {
  const Tensor& x;
  DType dtype;

  void check_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cuda() == x.is_cuda() && t.is_cpu() == x.is_cpu() &&
                        t.get_device_index() == x.get_device_index(),
                    name, " must be on the device of x");
  }

  // Memory in the dtype of x, dense in the order of its dimensions.
  void* dense(const char* name, const Tensor& t, Sizes sizes) const {
    check_sizes(name, t, sizes);
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
    STD_TORCH_CHECK(dtype_of(name, t) == dtype, name, " must have the dtype of x");
    return t.data_ptr();
  }

  // [N, C, H, W] in the dtype of x, dense as [N, H, W, C].
  void* map(const char* name, const Tensor& t, Sizes sizes) const {
    check_sizes(name, t, sizes);
    STD_TORCH_CHECK(dtype_of(name, t) == dtype, name, " must have the dtype of x");
    check_nhwc(name, t);
    return t.data_ptr();
  }

  Param param(const char* name, const Tensor& t, Sizes sizes) const {
    check_sizes(name, t, sizes);
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
    const DType type = dtype_of(name, t);
    STD_TORCH_CHECK(type == DType::kFloat32 || type == dtype, name,
                    " must be float32 or have the dtype of x");
    return {t.data_ptr(), type == DType::kFloat32};
  }

  float* fp32(const char* name, const Tensor& t, Sizes sizes) const {
    check_device(name, t);
    return effnet::fp32(name, t, sizes);
  }

  BatchNorm batch_norm(const char* name, const Tensors& bn, double eps, int64_t channels) const {
    check_batch_norm(name, bn);
    return {param(name, bn[0], {channels}), param(name, bn[1], {channels}), param(name, bn[2], {channels}),
            param(name, bn[3], {channels}), static_cast<float>(eps)};
  }

  SqueezeExciteWeights squeeze_excite(const Tensors& se, const char* act_name, const std::string& act,
                                      const char* gate_name, const std::string& gate,
                                      int64_t channels) const {
    const int64_t reduced = check_squeeze_excite(se);
    STD_TORCH_CHECK(reduced > 0 && reduced <= INT_MAX, "se.w_reduce must have at least one row");
    SqueezeExciteWeights out;
    out.w_reduce = param("se.w_reduce", se[0], {reduced, channels, 1, 1});
    out.b_reduce = param("se.b_reduce", se[1], {reduced});
    out.w_expand = param("se.w_expand", se[2], {channels, reduced, 1, 1});
    out.b_expand = param("se.b_expand", se[3], {channels});
    out.reduced = static_cast<int>(reduced);
    out.act = act_code(act_name, act);
    out.gate = act_code(gate_name, gate);
    return out;
  }

 private:
  void check_sizes(const char* name, const Tensor& t, Sizes sizes) const {
    check_device(name, t);
    effnet::check_sizes(name, t, sizes);
  }
};

inline Call call_of(const char* name, const Tensor& x, int64_t dim) {
  check_dim(name, x, dim);
  for (int64_t i = 1; i < dim; ++i)
    STD_TORCH_CHECK(x.size(i) <= INT_MAX, name, " must be smaller than 2^31 in dimension ", i);
  return {x, dtype_of(name, x)};
}

inline int narrow(const char* name, int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= INT_MAX, name, " must be between 0 and 2^31 - 1, got ", value);
  return static_cast<int>(value);
}

struct WindowOf {
  Window window;
  int oh, ow;
};

// x: sizes of the map, [N, C, H, W].
inline WindowOf window_of(Sizes x, const Tensor& weight, Sizes stride, Sizes padding) {
  check_dim("weight", weight, 4);
  const auto [oh, ow] = window_result(x, weight.sizes(), stride, padding);
  STD_TORCH_CHECK(std::max(oh, ow) < INT_MAX - 1024,
                  "the result must have fewer than 2^31 - 1024 rows and columns");
  return {{narrow("weight", weight.size(2)), narrow("weight", weight.size(3)), narrow("stride", stride[0]),
           narrow("stride", stride[1]), narrow("padding", padding[0]), narrow("padding", padding[2])},
          narrow("out", oh),
          narrow("out", ow)};
}

inline Tensor empty_fp32(const Tensor& like, Sizes sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

}  // namespace effnet::cuda
