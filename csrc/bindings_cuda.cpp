// Registers the CUDA kernels as torch.ops.effnet_kernels_cuda.*, against PyTorch's stable ABI. The library
// links to the CUDA runtime statically and to no CUDA part of torch, so that it loads where there is no GPU.
#include "bindings_cuda.h"

namespace effnet::cuda {
namespace {

// What decides where the kernels run; no GPU is touched. The architectures are in the words of csrc/toolchain.py, the
// versions of CUDA are 13000 for 13.0; the driver's is 0 where there is none.
std::string built_for() { return EFFNET_CUDA_ARCHITECTURES; }

int64_t toolkit() { return CUDART_VERSION; }

int64_t driver() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
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
  const WindowOf window = window_of(x.sizes(), weight, stride, padding);
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
  const WindowOf window = window_of(x.sizes(), weight, stride, padding);
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

// What an MBConv's expansion and depthwise convolution are given, without the memory that they write.
ExpandDepthwiseParams expand_depthwise_params(const Call& call, const Tensor& x, const OptionalTensor& expand,
                                              const Tensors& expand_bn, double expand_eps,
                                              const Tensor& weight, const Tensors& bn, double eps,
                                              const std::vector<int64_t>& stride,
                                              const std::vector<int64_t>& padding, const std::string& act) {
  const int64_t n = x.size(0), c_in = x.size(1), h = x.size(2), w = x.size(3), c_mid = first_size(weight);
  const WindowOf window = window_of(x.sizes(), weight, stride, padding);
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
  return e;
}

ExpandDepthwisePlan plan_of(const ExpandDepthwiseParams& e, const OnDeviceOf& device) {
  if (e.expand_weight != nullptr) return expand_depthwise_plan(e, device.shared_limit());
  ExpandDepthwisePlan plan;
  plan.unsupported = "there is no expansion";
  return plan;
}

// The depthwise convolution alone, over the expanded map x.
DepthwiseParams depthwise_params(const ExpandDepthwiseParams& e, const void* x) {
  DepthwiseParams d;
  d.dtype = e.dtype;
  d.x = x, d.weight = e.weight, d.y = e.y, d.sums = e.sums;
  d.bn = e.bn;
  d.window = e.window;
  d.act = e.act;
  d.n = e.n, d.h = e.h, d.w = e.w, d.c = e.c_mid, d.oh = e.oh, d.ow = e.ow;
  return d;
}

// Expansion, if there is one, and depthwise convolution in one kernel, for callers that have other kernels
// for the rest of an MBConv. Returns how many sums an image has; -1: no kernel does both convolutions.
int64_t expand_depthwise_tiles(Tensor x, OptionalTensor expand, Tensors expand_bn, double expand_eps,
                               Tensor weight, Tensors bn, double eps, std::vector<int64_t> stride,
                               std::vector<int64_t> padding, std::string act) {
  const OnDeviceOf device(x);
  const Call call = call_of("x", x, 4);
  const ExpandDepthwiseParams e =
      expand_depthwise_params(call, x, expand, expand_bn, expand_eps, weight, bn, eps, stride, padding, act);
  if (!expand) return depthwise_tiles(depthwise_params(e, e.x));
  const ExpandDepthwisePlan plan = plan_of(e, device);
  return plan.unsupported == nullptr ? plan.tiles : -1;
}

void expand_depthwise(Tensor out, OptionalTensor sums, Tensor x, OptionalTensor expand, Tensors expand_bn,
                      double expand_eps, Tensor weight, Tensors bn, double eps, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::string act) {
  const OnDeviceOf device(x);
  const Call call = call_of("x", x, 4);
  ExpandDepthwiseParams e =
      expand_depthwise_params(call, x, expand, expand_bn, expand_eps, weight, bn, eps, stride, padding, act);
  const ExpandDepthwisePlan plan = plan_of(e, device);
  STD_TORCH_CHECK(!expand || plan.unsupported == nullptr, "expand_depthwise: ", plan.unsupported);
  e.y = call.map("out", out, {e.n, e.c_mid, e.oh, e.ow});
  if (sums) {
    const int64_t tiles = expand ? plan.tiles : depthwise_tiles(depthwise_params(e, e.x));
    e.sums = call.fp32("sums", *sums, {e.n, tiles, e.c_mid});
  }
  check("expand_depthwise", expand ? launch_expand_depthwise(e, plan, device.stream())
                                   : launch_depthwise_conv_bn_act(depthwise_params(e, e.x), device.stream()));
}

// Expansion and depthwise convolution in one kernel where it takes the shape, else in two; the gate; the
// projection.
void mbconv(Tensor out, Tensor x, OptionalTensor expand, Tensors expand_bn, double expand_eps, Tensor weight,
            Tensors bn, double eps, std::vector<int64_t> stride, std::vector<int64_t> padding,
            std::string act, Tensors se, std::string se_act, std::string se_gate, Tensor project,
            Tensors project_bn, double project_eps, std::string project_act, bool residual) {
  const OnDeviceOf device(x);
  const Call call = call_of("x", x, 4);
  ExpandDepthwiseParams e =
      expand_depthwise_params(call, x, expand, expand_bn, expand_eps, weight, bn, eps, stride, padding, act);
  const int64_t n = e.n, c_mid = e.c_mid, c_out = first_size(project);

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
  const ExpandDepthwisePlan plan = plan_of(e, device);
  const bool at_once = plan.unsupported == nullptr;
  g.tiles = at_once ? plan.tiles : depthwise_tiles(depthwise_params(e, e.x));
  const Tensor sums = empty_fp32(x, {n, se.empty() ? 0 : g.tiles, c_mid});
  if (!se.empty()) g.sums = e.sums = static_cast<float*>(sums.data_ptr());
  Tensor expanded = filtered;  // what it holds has to live until all is enqueued
  if (at_once) {
    check("mbconv", launch_expand_depthwise(e, plan, device.stream()));
  } else {
    const void* map = e.x;
    if (expand) {
      expanded = torch::stable::new_empty(x, {n, e.h, e.w, c_mid});
      PointwiseParams p;
      p.dtype = call.dtype;
      p.x = e.x;
      p.weight = e.expand_weight;
      p.y = expanded.data_ptr();
      p.bn = e.expand_bn;
      p.act = e.act;
      p.n = n, p.pixels = int64_t{e.h} * e.w, p.c_in = e.c_in, p.c_out = e.c_mid;
      check("mbconv", launch_pointwise_conv_bn_act(p, device.stream()));
      map = p.y;
    }
    check("mbconv", launch_depthwise_conv_bn_act(depthwise_params(e, map), device.stream()));
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

}  // namespace
}  // namespace effnet::cuda

STABLE_TORCH_LIBRARY(effnet_kernels_cuda, m) {
  m.def("built_for() -> str");
  m.def("toolkit() -> int");
  m.def("driver() -> int");
  m.def("pointwise_conv_bn_act(Tensor(a!) out, " EFFNET_POINTWISE_CONV_BN_ACT ") -> ()");
  m.def("depthwise_conv_bn_act(Tensor(a!) out, Tensor(b!) mean, " EFFNET_DEPTHWISE_CONV_BN_ACT ") -> ()");
  m.def("squeeze_excite_gate(Tensor(a!) out, " EFFNET_SQUEEZE_EXCITE_GATE ") -> ()");
  m.def("squeeze_excite(Tensor(a!) out, " EFFNET_SQUEEZE_EXCITE ") -> ()");
  m.def("fused_mbconv(Tensor(a!) out, " EFFNET_FUSED_MBCONV ") -> ()");
  m.def("expand_depthwise_tiles(" EFFNET_EXPAND_DEPTHWISE ") -> int");
  m.def("expand_depthwise(Tensor(a!) out, Tensor(b!)? sums, " EFFNET_EXPAND_DEPTHWISE ") -> ()");
  m.def("mbconv(Tensor(a!) out, " EFFNET_MBCONV ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("built_for", TORCH_BOX(&effnet::cuda::built_for));
  m.impl("toolkit", TORCH_BOX(&effnet::cuda::toolkit));
  m.impl("driver", TORCH_BOX(&effnet::cuda::driver));
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cuda, CUDA, m) {
  m.impl("pointwise_conv_bn_act", TORCH_BOX(&effnet::cuda::pointwise_conv_bn_act));
  m.impl("depthwise_conv_bn_act", TORCH_BOX(&effnet::cuda::depthwise_conv_bn_act));
  m.impl("squeeze_excite_gate", TORCH_BOX(&effnet::cuda::squeeze_excite_gate));
  m.impl("squeeze_excite", TORCH_BOX(&effnet::cuda::squeeze_excite));
  m.impl("fused_mbconv", TORCH_BOX(&effnet::cuda::fused_mbconv));
  m.impl("expand_depthwise_tiles", TORCH_BOX(&effnet::cuda::expand_depthwise_tiles));
  m.impl("expand_depthwise", TORCH_BOX(&effnet::cuda::expand_depthwise));
  m.impl("mbconv", TORCH_BOX(&effnet::cuda::mbconv));
}
