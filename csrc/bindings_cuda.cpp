// Registers the CUDA kernels as torch.ops.effnet_kernels_cuda.*, against PyTorch's stable ABI. It checks all
// that the launchers rely on; a call that passes cannot touch memory outside its tensors. It links to the
// CUDA runtime statically and to no CUDA part of torch, so that it loads where there is no GPU.
//
// With CUDA_EMULATION the same ops serve CPU tensors: see tests/emulation.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <climits>
#include <optional>
#include <string>
#include <vector>

#include "cuda/api.h"

#if !defined(CUDA_EMULATION)
#include <dlfcn.h>
#endif

namespace effnet::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// ---- device and stream -----------------------------------------------------------------------------------

void check(const char* op, const Status& status) {
  if (status.ok()) return;
  const char* message = status.message == nullptr ? "" : status.message;
  if (status.message != nullptr && status.error == cudaErrorInvalidValue)
    STD_TORCH_CHECK(false, op, ": ", message);
  STD_TORCH_CHECK(false, op, ": ", cudaGetErrorString(status.error), *message != '\0' ? ": " : "", message);
}

void check(const char* op, cudaError_t error) { check(op, Status{error, nullptr}); }

// torch's current stream on a device. It comes from torch's CUDA library, which is looked up among those that
// are loaded instead of linked to.
cudaStream_t current_stream([[maybe_unused]] int device) {
#if defined(CUDA_EMULATION)
  return nullptr;
#else
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
#endif
}

// Makes the device of x current as long as it lives; the stream to launch on.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) {
#if defined(CUDA_EMULATION)
    STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU: these kernels are emulated");
#else
    STD_TORCH_CHECK(x.is_cuda(), "x must be on a CUDA device");
    device_ = x.get_device_index();
    check("cudaGetDevice", cudaGetDevice(&previous_));
    if (previous_ != device_) check("cudaSetDevice", cudaSetDevice(device_));
#endif
    stream_ = current_stream(device_);
  }
  ~OnDeviceOf() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  cudaStream_t stream() const { return stream_; }

  // Bytes of shared memory that a block may ask for.
  int shared_limit() const {
    int bytes = 0;
    check("cudaDeviceGetAttribute",
          cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
    return bytes;
  }

 private:
  int device_ = 0, previous_ = 0;
  cudaStream_t stream_ = nullptr;
};

// Why the kernels cannot run on a device, in CUDA's words; empty where they can.
std::string refusal([[maybe_unused]] int64_t device) {
#if !defined(CUDA_EMULATION)
  int previous = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(static_cast<int>(device));
  if (error == cudaSuccess) error = find_code();
  if (error != cudaSuccess) cudaGetLastError();
  cudaSetDevice(previous);
  if (error != cudaSuccess) return cudaGetErrorString(error);
#endif
  return "";
}

// ---- arguments -------------------------------------------------------------------------------------------

int act_code(const char* name, const std::string& act) {
  static const char* const names[] = {"identity",  "relu",    "relu6",      "silu",
                                      "hardswish", "sigmoid", "hardsigmoid"};
  for (int code = 0; code <= kHardsigmoid; ++code)
    if (act == names[code]) return code;
  STD_TORCH_CHECK(false, name, " is no activation that the CUDA kernels know: ", act);
  return kIdentity;
}

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
      return DType::kFloat32;
  }
}

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
  void* dense(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const {
    check_sizes(name, t, sizes);
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
    STD_TORCH_CHECK(dtype_of(name, t) == dtype, name, " must have the dtype of x");
    return t.data_ptr();
  }

  // [N, C, H, W] in the dtype of x, dense as [N, H, W, C].
  void* map(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const {
    check_sizes(name, t, sizes);
    STD_TORCH_CHECK(dtype_of(name, t) == dtype, name, " must have the dtype of x");
    const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
    STD_TORCH_CHECK(t.stride(0) == h * w * c && t.stride(1) == 1 && t.stride(2) == w * c && t.stride(3) == c,
                    name, " must be dense in [N, H, W, C] memory");
    return t.data_ptr();
  }

  Param param(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const {
    check_sizes(name, t, sizes);
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
    const DType type = dtype_of(name, t);
    STD_TORCH_CHECK(type == DType::kFloat32 || type == dtype, name,
                    " must be float32 or have the dtype of x");
    return {t.data_ptr(), type == DType::kFloat32};
  }

  float* fp32(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const {
    check_sizes(name, t, sizes);
    STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == ScalarType::Float, name,
                    " must be contiguous float32");
    return static_cast<float*>(t.data_ptr());
  }

  BatchNorm batch_norm(const char* name, const Tensors& bn, double eps, int64_t channels) const {
    STD_TORCH_CHECK(bn.size() == 4, name, " must be gamma, beta, running_mean, running_var; got ", bn.size(),
                    " tensors");
    return {param(name, bn[0], {channels}), param(name, bn[1], {channels}), param(name, bn[2], {channels}),
            param(name, bn[3], {channels}), static_cast<float>(eps)};
  }

  SqueezeExcite squeeze_excite(const Tensors& se, const char* act_name, const std::string& act,
                               const char* gate_name, const std::string& gate, int64_t channels) const {
    STD_TORCH_CHECK(se.size() == 4, "se must be w_reduce, b_reduce, w_expand, b_expand; got ", se.size(),
                    " tensors");
    const int64_t reduced = se[0].dim() > 0 ? se[0].size(0) : 0;
    STD_TORCH_CHECK(reduced > 0 && reduced <= INT_MAX, "se.w_reduce must have at least one row");
    SqueezeExcite out;
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
  void check_sizes(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const {
    check_device(name, t);
    STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(),
                    " dimensions, got ", t.dim());
    for (size_t i = 0; i < sizes.size(); ++i)
      STD_TORCH_CHECK(t.size(static_cast<int64_t>(i)) == sizes[i], name, " must have size ", sizes[i],
                      " in dimension ", i, ", got ", t.size(static_cast<int64_t>(i)));
  }
};

Call call_of(const char* name, const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(x.dim() == dim, name, " must have ", dim, " dimensions, got ", x.dim());
  for (int64_t i = 1; i < dim; ++i)
    STD_TORCH_CHECK(x.size(i) <= INT_MAX, name, " must be smaller than 2^31 in dimension ", i);
  return {x, dtype_of(name, x)};
}

int64_t first_size(const Tensor& t) { return t.dim() > 0 ? t.size(0) : 0; }

int narrow(const char* name, int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= INT_MAX, name, " must be between 0 and 2^31 - 1, got ", value);
  return static_cast<int>(value);
}

struct WindowOf {
  Window window;
  int oh, ow;
};

// `size` of the map: [N, C, H, W].
WindowOf window_of(const std::vector<int64_t>& size, const Tensor& weight, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight must have 4 dimensions, got ", weight.dim());
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0,
                  "stride must be two positive numbers");
  STD_TORCH_CHECK(padding.size() == 4, "padding must be top, bottom, left, right");
  for (int64_t p : padding)
    STD_TORCH_CHECK(p >= 0 && p < (1 << 30), "padding must not be negative nor exceed 2^30, got ", p);
  int64_t out[2];
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t kernel = weight.size(2 + axis);
    const int64_t room = size[2 + axis] + padding[2 * axis] + padding[2 * axis + 1] - kernel;
    STD_TORCH_CHECK(kernel > 0 && room >= 0, "weight must fit the padded map");
    out[axis] = room / stride[axis] + 1;
  }
  return {{narrow("weight", weight.size(2)), narrow("weight", weight.size(3)), narrow("stride", stride[0]),
           narrow("stride", stride[1]), narrow("padding", padding[0]), narrow("padding", padding[2])},
          narrow("out", out[0]),
          narrow("out", out[1])};
}

WindowOf window_of(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding) {
  return window_of({x.size(0), x.size(1), x.size(2), x.size(3)}, weight, stride, padding);
}

Tensor empty_fp32(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// ---- ops -------------------------------------------------------------------------------------------------

void pointwise_conv_bn_act(Tensor out, Tensor x, Tensor weight, Tensors bn, double eps, std::string act,
                           OptionalTensor gate, OptionalTensor residual, bool pool) {
  const OnDeviceOf device(x);
  const Call call = call_of("x", x, 4);
  const int64_t n = x.size(0), c_in = x.size(1), h = x.size(2), w = x.size(3), c_out = first_size(weight);
  PointwiseParams p;
  p.dtype = call.dtype;
  p.x = call.map("x", x, {n, c_in, h, w});
  p.weight = call.dense("weight", weight, {c_out, c_in, 1, 1});
  if (gate) p.gate = call.fp32("gate", *gate, {n, c_in});
  if (residual) p.residual = call.map("residual", *residual, {n, c_out, h, w});
  p.y = pool ? call.dense("out", out, {n, c_out}) : call.map("out", out, {n, c_out, h, w});
  p.bn = call.batch_norm("bn", bn, eps, c_out);
  p.act = act_code("act", act);
  p.pool = pool;
  p.n = n;
  p.pixels = h * w;
  p.c_in = narrow("x", c_in);
  p.c_out = narrow("weight", c_out);
  check("pointwise_conv_bn_act", launch_pointwise_conv_bn_act(p, device.stream()));
}

void depthwise_conv_bn_act(Tensor out, Tensor mean, Tensor x, Tensor weight, Tensors bn, double eps,
                           std::vector<int64_t> stride, std::vector<int64_t> padding, std::string act,
                           bool with_mean) {
  const OnDeviceOf device(x);
  const Call call = call_of("x", x, 4);
  const int64_t n = x.size(0), c = x.size(1);
  const WindowOf window = window_of(x, weight, stride, padding);
  DepthwiseParams p;
  p.dtype = call.dtype;
  p.x = call.map("x", x, {n, c, x.size(2), x.size(3)});
  p.weight = call.dense("weight", weight, {c, 1, weight.size(2), weight.size(3)});
  p.y = call.map("out", out, {n, c, window.oh, window.ow});
  p.bn = call.batch_norm("bn", bn, eps, c);
  p.window = window.window;
  p.act = act_code("act", act);
  p.n = n;
  p.h = narrow("x", x.size(2)), p.w = narrow("x", x.size(3)), p.c = narrow("x", c);
  p.oh = window.oh, p.ow = window.ow;
  if (!with_mean || n == 0) {
    check("depthwise_conv_bn_act", launch_depthwise_conv_bn_act(p, device.stream()));
    return;
  }
  MeanParams m;
  m.mean = call.fp32("mean", mean, {n, c});
  m.tiles = depthwise_tiles(p);
  const Tensor sums = empty_fp32(x, {n, m.tiles, c});
  m.sums = p.sums = static_cast<float*>(sums.data_ptr());
  m.n = n, m.c = p.c, m.pixels = int64_t{p.oh} * p.ow;
  check("depthwise_conv_bn_act", launch_depthwise_conv_bn_act(p, device.stream()));
  check("depthwise_conv_bn_act", launch_mean(m, device.stream()));
}

void squeeze_excite_gate(Tensor out, Tensor mean, Tensors se, std::string act, std::string gate) {
  const OnDeviceOf device(mean);
  Call call = call_of("mean", mean, 2);
  for (const Tensor& t : se)
    if (t.scalar_type() != ScalarType::Float) call.dtype = dtype_of("se", t);
  const int64_t n = mean.size(0), c = mean.size(1);
  GateParams p;
  p.dtype = call.dtype;
  p.sums = call.fp32("mean", mean, {n, c});
  p.gate = call.fp32("out", out, {n, c});
  p.se = call.squeeze_excite(se, "act", act, "gate", gate, c);
  p.n = n;
  p.c = narrow("mean", c);
  check("squeeze_excite_gate", launch_squeeze_excite_gate(p, device.stream()));
}

void squeeze_excite(Tensor out, Tensor x, Tensors se, std::string act, std::string gate) {
  const OnDeviceOf device(x);
  const Call call = call_of("x", x, 4);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  PoolParams pool;
  pool.dtype = call.dtype;
  pool.x = call.map("x", x, {n, c, h, w});
  pool.n = n, pool.pixels = h * w, pool.c = narrow("x", c);
  ScaleParams scale;
  scale.dtype = call.dtype;
  scale.x = pool.x;
  scale.y = call.map("out", out, {n, c, h, w});
  scale.n = n, scale.pixels = pool.pixels, scale.c = pool.c;
  GateParams p;
  p.dtype = call.dtype;
  p.se = call.squeeze_excite(se, "act", act, "gate", gate, c);
  p.n = n, p.c = pool.c, p.pixels = pool.pixels, p.tiles = pool_tiles(pool);
  if (n == 0 || c == 0 || pool.pixels == 0) return;
  const Tensor sums = empty_fp32(x, {n, p.tiles, c}), gates = empty_fp32(x, {n, c});
  p.sums = pool.sums = static_cast<float*>(sums.data_ptr());
  scale.gate = p.gate = static_cast<float*>(gates.data_ptr());
  check("squeeze_excite", launch_pool(pool, device.stream()));
  check("squeeze_excite", launch_squeeze_excite_gate(p, device.stream()));
  check("squeeze_excite", launch_scale(scale, device.stream()));
}

void fused_mbconv(Tensor out, Tensor x, Tensor weight, Tensors bn, double eps, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::string act, OptionalTensor project, Tensors project_bn,
                  double project_eps, bool residual) {
  const OnDeviceOf device(x);
  const Call call = call_of("x", x, 4);
  const int64_t n = x.size(0), c_in = x.size(1), c_mid = first_size(weight);
  const WindowOf window = window_of(x, weight, stride, padding);
  FusedMBConvParams p;
  p.dtype = call.dtype;
  p.x = x.data_ptr();
  p.x_stride[0] = x.stride(0), p.x_stride[1] = x.stride(2), p.x_stride[2] = x.stride(3),
  p.x_stride[3] = x.stride(1);
  p.weight = call.map("weight", weight, {c_mid, c_in, window.window.kh, window.window.kw});
  p.bn = call.batch_norm("bn", bn, eps, c_mid);
  int64_t c_out = c_mid;
  if (project) {
    c_out = first_size(*project);
    p.project = call.dense("project_weight", *project, {c_out, c_mid, 1, 1});
    p.project_bn = call.batch_norm("project_bn", project_bn, project_eps, c_out);
  }
  p.y = call.map("out", out, {n, c_out, window.oh, window.ow});
  if (residual) call.map("x with residual", x, {n, c_out, window.oh, window.ow});
  p.residual = residual;
  p.window = window.window;
  p.act = act_code("act", act);
  p.n = n;
  p.h = narrow("x", x.size(2)), p.w = narrow("x", x.size(3)), p.oh = window.oh, p.ow = window.ow;
  p.c_in = narrow("x", c_in), p.c_mid = narrow("weight", c_mid), p.c_out = narrow("project_weight", c_out);
  check("fused_mbconv", launch_fused_mbconv(p, device.shared_limit(), device.stream()));
}

// Expansion and depthwise convolution in one kernel where it takes the shape, else in two; the gate; the
// projection.
void mbconv(Tensor out, Tensor x, OptionalTensor expand, Tensors expand_bn, double expand_eps, Tensor weight,
            Tensors bn, double eps, std::vector<int64_t> stride, std::vector<int64_t> padding,
            std::string act, Tensors se, std::string se_act, std::string se_gate, Tensor project,
            Tensors project_bn, double project_eps, std::string project_act, bool residual) {
  const OnDeviceOf device(x);
  const Call call = call_of("x", x, 4);
  const int64_t n = x.size(0), c_in = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t c_mid = first_size(weight), c_out = first_size(project);
  const WindowOf window = window_of(x, weight, stride, padding);

  ExpandDepthwiseParams e;
  e.dtype = call.dtype;
  e.x = call.map("x", x, {n, c_in, h, w});
  if (expand) {
    e.expand_weight = call.dense("expand_weight", *expand, {c_mid, c_in, 1, 1});
    e.expand_bn = call.batch_norm("expand_bn", expand_bn, expand_eps, c_mid);
  }
  e.weight = call.dense("weight", weight, {expand ? c_mid : c_in, 1, window.window.kh, window.window.kw});
  e.bn = call.batch_norm("bn", bn, eps, c_mid);
  e.window = window.window;
  e.act = act_code("act", act);
  e.n = n;
  e.h = narrow("x", h), e.w = narrow("x", w), e.c_in = narrow("x", c_in), e.c_mid = narrow("weight", c_mid);
  e.oh = window.oh, e.ow = window.ow;

  PointwiseParams q;  // the projection
  q.dtype = call.dtype;
  q.weight = call.dense("project_weight", project, {c_out, c_mid, 1, 1});
  q.bn = call.batch_norm("project_bn", project_bn, project_eps, c_out);
  q.act = act_code("project_act", project_act);
  q.y = call.map("out", out, {n, c_out, e.oh, e.ow});
  if (residual) q.residual = call.map("x with residual", x, {n, c_out, e.oh, e.ow});
  q.n = n, q.pixels = int64_t{e.oh} * e.ow, q.c_in = e.c_mid, q.c_out = narrow("project_weight", c_out);

  GateParams g;
  if (!se.empty()) g.se = call.squeeze_excite(se, "se_act", se_act, "se_gate", se_gate, c_mid);
  if (n == 0 || c_mid == 0) return;

  const Tensor filtered = torch::stable::new_empty(x, {n, e.oh, e.ow, c_mid});
  e.y = filtered.data_ptr();
  q.x = e.y;
  const auto sums_of = [&](int tiles) {
    Tensor sums = empty_fp32(x, {n, se.empty() ? 0 : tiles, c_mid});
    g.tiles = tiles;
    if (!se.empty()) g.sums = e.sums = static_cast<float*>(sums.data_ptr());
    return sums;
  };

  ExpandDepthwisePlan plan;
  plan.unsupported = "there is no expansion";
  if (expand) plan = expand_depthwise_plan(e, device.shared_limit());
  Tensor sums = filtered, expanded = filtered;  // whatever these hold lives until all is enqueued
  if (plan.unsupported == nullptr) {
    sums = sums_of(plan.tiles);
    check("mbconv", launch_expand_depthwise(e, plan, device.stream()));
  } else {
    DepthwiseParams d;
    d.dtype = call.dtype;
    d.x = e.x;
    if (expand) {
      expanded = torch::stable::new_empty(x, {n, h, w, c_mid});
      PointwiseParams p;
      p.dtype = call.dtype;
      p.x = e.x;
      p.weight = e.expand_weight;
      p.y = expanded.data_ptr();
      p.bn = e.expand_bn;
      p.act = e.act;
      p.n = n, p.pixels = h * w, p.c_in = e.c_in, p.c_out = e.c_mid;
      check("mbconv", launch_pointwise_conv_bn_act(p, device.stream()));
      d.x = p.y;
    }
    d.weight = e.weight;
    d.y = e.y;
    d.bn = e.bn;
    d.window = e.window;
    d.act = e.act;
    d.n = n, d.h = e.h, d.w = e.w, d.c = e.c_mid, d.oh = e.oh, d.ow = e.ow;
    sums = sums_of(depthwise_tiles(d));
    d.sums = e.sums;
    check("mbconv", launch_depthwise_conv_bn_act(d, device.stream()));
  }
  Tensor gate = filtered;
  if (!se.empty()) {
    gate = empty_fp32(x, {n, c_mid});
    g.dtype = call.dtype;
    g.gate = static_cast<float*>(gate.data_ptr());
    g.n = n, g.c = e.c_mid, g.pixels = q.pixels;
    check("mbconv", launch_squeeze_excite_gate(g, device.stream()));
    q.gate = g.gate;
  }
  check("mbconv", launch_pointwise_conv_bn_act(q, device.stream()));
}

void train_depthwise(Tensor out, OptionalTensor statistics, Tensor x, OptionalTensor x_norm,
                     std::string x_act, Tensor weight, std::vector<int64_t> stride,
                     std::vector<int64_t> padding) {
  const OnDeviceOf device(x);
  const Call call = call_of("x", x, 4);
  const int64_t n = x.size(0), c = x.size(1);
  const WindowOf window = window_of(x, weight, stride, padding);
  TrainDepthwiseParams p;
  p.dtype = call.dtype;
  p.window = window.window;
  p.n = n;
  p.h = narrow("x", x.size(2)), p.w = narrow("x", x.size(3)), p.c = narrow("x", c);
  p.oh = window.oh, p.ow = window.ow;
  p.x = call.map("x", x, {n, c, x.size(2), x.size(3)});
  if (x_norm) p.x_norm = call.fp32("x_norm", *x_norm, {4, c});
  p.x_act = act_code("x_act", x_act);
  p.weight = call.dense("weight", weight, {c, 1, weight.size(2), weight.size(3)});
  p.y = call.map("out", out, {n, c, p.oh, p.ow});
  if (statistics) p.statistics = call.fp32("statistics", *statistics, {2, c});
  const Tensor partial = empty_fp32(x, {statistics ? train_depthwise_partial(p) : 0});
  p.partial = static_cast<float*>(partial.data_ptr());
  check("train_depthwise", launch_train_depthwise(p, device.stream()));
}

// The gradient is that of effnet_kernels/ops/conv_block_train/layers.py: grad, raw, the norm's vectors, its
// activation, gate and bias.
void train_depthwise_backward(OptionalTensor dx, OptionalTensor dweight, OptionalTensor moments,
                              OptionalTensor grad, OptionalTensor raw, Tensor norm, std::string act,
                              OptionalTensor gate, OptionalTensor bias, Tensor coefficients, OptionalTensor x,
                              OptionalTensor x_norm, std::string x_act, Tensor weight,
                              std::vector<int64_t> size, std::vector<int64_t> stride,
                              std::vector<int64_t> padding) {
  const OnDeviceOf device(weight);
  const Call call = call_of("weight", weight, 4);
  STD_TORCH_CHECK(size.size() == 4 && size[0] >= 0, "size must be that of x");
  const int64_t n = size[0], c = size[1];
  const WindowOf window = window_of(size, weight, stride, padding);
  TrainDepthwiseBackwardParams p;
  p.dtype = call.dtype;
  p.window = window.window;
  p.n = n;
  p.c = narrow("x", c), p.h = narrow("x", size[2]), p.w = narrow("x", size[3]);
  p.oh = window.oh, p.ow = window.ow;
  const std::vector<int64_t> out = {n, c, p.oh, p.ow};
  p.weight = call.dense("weight", weight, {c, 1, weight.size(2), weight.size(3)});
  if (grad) p.grad = call.map("grad", *grad, out);
  if (raw) p.raw = call.map("raw", *raw, out);
  p.norm = call.fp32("norm", norm, {4, c});
  p.act = act_code("act", act);
  if (gate) p.gate = call.fp32("gate", *gate, {n, c});
  if (bias) p.bias = call.fp32("bias", *bias, {n, c});
  p.coefficients = call.fp32("coefficients", coefficients, {3, c});
  if (x) p.x = call.map("x", *x, size);
  if (x_norm) p.x_norm = call.fp32("x_norm", *x_norm, {4, c});
  p.x_act = act_code("x_act", x_act);
  if (dx) p.dx = call.map("dx", *dx, size);
  if (dweight) p.dweight = call.dense("dweight", *dweight, {c, 1, weight.size(2), weight.size(3)});
  if (moments) p.moments = call.fp32("moments", *moments, {2, c});
  STD_TORCH_CHECK(p.act <= kHardswish && p.x_act <= kHardswish, "gates are no activations in training");
  STD_TORCH_CHECK(raw || p.act == kIdentity, "the derivative of act needs raw");
  STD_TORCH_CHECK(x || (!dweight && !x_norm), "dweight and x_norm need x");
  const Tensor partial = empty_fp32(weight, {train_depthwise_backward_partial(p)});
  p.partial = static_cast<float*>(partial.data_ptr());
  check("train_depthwise_backward", launch_train_depthwise_backward(p, device.stream()));
}

}  // namespace
}  // namespace effnet::cuda

// Outputs come first; then the arguments of effnet_kernels::<op>, less the backend.
STABLE_TORCH_LIBRARY(effnet_kernels_cuda, m) {
  m.def("refusal(int device) -> str");
  m.def(
      "pointwise_conv_bn_act(Tensor(a!) out, Tensor x, Tensor weight, Tensor[] bn, float eps, str act, "
      "Tensor? gate, "
      "Tensor? residual, bool pool) -> ()");
  m.def(
      "depthwise_conv_bn_act(Tensor(a!) out, Tensor(b!) mean, Tensor x, Tensor weight, Tensor[] bn, float "
      "eps, "
      "int[] stride, int[] padding, str act, bool with_mean) -> ()");
  m.def("squeeze_excite_gate(Tensor(a!) out, Tensor mean, Tensor[] se, str act, str gate) -> ()");
  m.def("squeeze_excite(Tensor(a!) out, Tensor x, Tensor[] se, str act, str gate) -> ()");
  m.def(
      "fused_mbconv(Tensor(a!) out, Tensor x, Tensor weight, Tensor[] bn, float eps, int[] stride, int[] "
      "padding, "
      "str act, Tensor? project_weight, Tensor[] project_bn, float project_eps, bool residual) -> ()");
  m.def(
      "mbconv(Tensor(a!) out, Tensor x, Tensor? expand_weight, Tensor[] expand_bn, float expand_eps, Tensor "
      "weight, "
      "Tensor[] bn, float eps, int[] stride, int[] padding, str act, Tensor[] se, str se_act, str se_gate, "
      "Tensor project_weight, Tensor[] project_bn, float project_eps, str project_act, bool residual) -> ()");
  m.def(
      "train_depthwise(Tensor(a!) out, Tensor(b!)? statistics, Tensor x, Tensor? x_norm, str x_act, "
      "Tensor weight, int[] stride, int[] padding) -> ()");
  m.def(
      "train_depthwise_backward(Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? moments, Tensor? grad, "
      "Tensor? raw, Tensor norm, str act, Tensor? gate, Tensor? bias, Tensor coefficients, Tensor? x, "
      "Tensor? x_norm, str x_act, Tensor weight, int[] size, int[] stride, int[] padding) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("refusal", TORCH_BOX(&effnet::cuda::refusal));
}

#if defined(CUDA_EMULATION)
STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cuda, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cuda, CUDA, m) {
#endif
  m.impl("pointwise_conv_bn_act", TORCH_BOX(&effnet::cuda::pointwise_conv_bn_act));
  m.impl("depthwise_conv_bn_act", TORCH_BOX(&effnet::cuda::depthwise_conv_bn_act));
  m.impl("squeeze_excite_gate", TORCH_BOX(&effnet::cuda::squeeze_excite_gate));
  m.impl("squeeze_excite", TORCH_BOX(&effnet::cuda::squeeze_excite));
  m.impl("fused_mbconv", TORCH_BOX(&effnet::cuda::fused_mbconv));
  m.impl("mbconv", TORCH_BOX(&effnet::cuda::mbconv));
  m.impl("train_depthwise", TORCH_BOX(&effnet::cuda::train_depthwise));
  m.impl("train_depthwise_backward", TORCH_BOX(&effnet::cuda::train_depthwise_backward));
}
