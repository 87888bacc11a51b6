// Registers the kernels of a block in training as torch.ops.effnet_kernels_cpu.train_*.
//
// A norm comes as its [4, C] vectors and the name of its activation, a gradient as the tensors of
// layers.Gradient. Nothing is allocated here.
#include "bindings_cpu.h"
#include "cpu/instruction_sets.h"
#include "cpu/train.h"

namespace effnet {
namespace {

// A map of a type that there are training kernels for.
Tensor4 trained_map(const char* name, const Tensor& t) {
  const Tensor4 out = map(name, t);
  STD_TORCH_CHECK(out.type != DType::kFloat16, name,
                  " must be float32 or bfloat16: no kernel trains in float16");
  return out;
}

Tensor4 same_map(const char* name, const Tensor& t, const Tensor4& like) {
  check_sizes(name, t, like.size);
  const Tensor4 out = trained_map(name, t);
  STD_TORCH_CHECK(out.type == like.type, name, " must have the dtype of the other maps");
  return out;
}

TrainNorm norm_of(const OptionalTensor& vectors, const std::string& act, int64_t channels) {
  if (!vectors) {
    STD_TORCH_CHECK(act == "identity", "an activation needs a norm");
    return {};
  }
  return {floats("norm", *vectors, {4, channels}), act_code("act", act)};
}

TrainSource source_of(const Tensor& raw, const OptionalTensor& norm, const std::string& act,
                      const OptionalTensor& gate) {
  TrainSource x;
  x.raw = trained_map("raw", raw);
  x.norm = norm_of(norm, act, x.raw.size[1]);
  if (gate) x.gate = floats("gate", *gate, {x.raw.size[0], x.raw.size[1]});
  return x;
}

TrainGradient gradient_of(const OptionalTensor& grad, const OptionalTensor& raw, const Tensor& norm,
                          const std::string& act, const OptionalTensor& gate, const OptionalTensor& bias) {
  TrainGradient g;
  STD_TORCH_CHECK(grad || raw, "grad or raw must be given");
  if (raw) g.raw = trained_map("raw", *raw);
  if (grad) g.grad = raw ? same_map("grad", *grad, g.raw) : trained_map("grad", *grad);
  const auto& size = g.shape().size;
  g.norm = norm_of(norm, act, size[1]);
  STD_TORCH_CHECK(raw || g.norm.act == kIdentity, "raw must be given: the activation's derivative needs it");
  if (gate) g.gate = floats("gate", *gate, {size[0], size[1]});
  if (bias) g.bias = floats("bias", *bias, {size[0], size[1]});
  return g;
}

void statistics(Tensor out, Tensor raw) {
  const Tensor4 y = trained_map("raw", raw);
  float* to = floats("out", out, {2, y.size[1]});
  if (!empty(y)) train_kernels().statistics(y, to, pool());
}

void norm(Tensor out, Tensor statistics, Tensor gamma, Tensor beta, double eps) {
  const int64_t channels = first_size(gamma);
  BatchNorm bn;
  bn.gamma = vector("gamma", gamma, channels);
  bn.beta = vector("beta", beta, channels);
  bn.eps = static_cast<float>(eps);
  train_kernels().norm(floats("statistics", statistics, {2, channels}), bn, channels,
                       floats("out", out, {4, channels}));
}

void coefficients(Tensor out, Tensor norm, Tensor moments, int64_t count) {
  const int64_t channels = norm.dim() > 1 ? norm.size(1) : 0;
  train_kernels().coefficients(floats("norm", norm, {4, channels}), floats("moments", moments, {2, channels}),
                               channels, count, floats("out", out, {3, channels}));
}

void pool_map(Tensor out, Tensor raw, OptionalTensor norm, std::string act) {
  const TrainSource x = source_of(raw, norm, act, std::nullopt);
  float* to = floats("out", out, {x.raw.size[0], x.raw.size[1]});
  if (!empty(x.raw)) train_kernels().pool(x, to, pool());
}

void apply(Tensor out, Tensor raw, OptionalTensor norm, std::string act, OptionalTensor gate,
           OptionalTensor residual) {
  const TrainSource x = source_of(raw, norm, act, gate);
  const Tensor4 y = same_map("out", out, x.raw);
  const void* add = residual ? same_map("residual", *residual, x.raw).data : nullptr;
  if (!empty(y)) train_kernels().apply(x, add, y, pool());
}

void moments(Tensor out, OptionalTensor grad, OptionalTensor raw, Tensor norm, std::string act,
             OptionalTensor gate, OptionalTensor bias) {
  const TrainGradient g = gradient_of(grad, raw, norm, act, gate, bias);
  float* to = floats("out", out, {2, g.shape().size[1]});
  if (!empty(g.shape())) train_kernels().moments(g, to, pool());
}

void gate_moments(Tensor out, Tensor grad, Tensor raw, Tensor norm, std::string act) {
  const TrainSource x = source_of(raw, norm, act, std::nullopt);
  const Tensor4 g = same_map("grad", grad, x.raw);
  float* to = floats("out", out, {5, x.raw.size[0], x.raw.size[1]});
  if (!empty(g)) train_kernels().gate_moments(g, x, to, pool());
}

void raw_gradient(Tensor out, OptionalTensor grad, OptionalTensor raw, Tensor norm, std::string act,
                  OptionalTensor gate, OptionalTensor bias, Tensor coefficients) {
  const TrainGradient g = gradient_of(grad, raw, norm, act, gate, bias);
  const Tensor4 dy = same_map("out", out, g.shape());
  const float* pqr = floats("coefficients", coefficients, {3, dy.size[1]});
  if (!empty(dy)) train_kernels().raw_gradient(g, pqr, dy, pool());
}

Tensor4 depthwise_weight(const Tensor& weight, const Tensor4& x) {
  const Tensor4 w = tensor4("weight", weight);
  check_sizes("weight", weight, {x.size[1], 1, w.size[2], w.size[3]});
  STD_TORCH_CHECK(w.type == x.type, "weight must have the dtype of the maps");
  return w;
}

Window window(const Tensor4& x, const Tensor4& weight, const Tensor4& y, Sizes stride, Sizes padding) {
  STD_TORCH_CHECK(x.size[0] == y.size[0] && x.size[1] == y.size[1] && x.type == y.type,
                  "input and output of a depthwise convolution must agree in N, C and dtype");
  const WindowOf out = window_of(x.size, weight.size, stride, padding);
  STD_TORCH_CHECK(y.size[2] == out.oh && y.size[3] == out.ow, "out must have size [", out.oh, ", ", out.ow,
                  "] in its last dimensions");
  return out.window;
}

void depthwise(Tensor out, OptionalTensor measured, Tensor raw, OptionalTensor norm, std::string act,
               Tensor weight, std::vector<int64_t> stride, std::vector<int64_t> padding) {
  TrainDepthwise p;
  p.x = source_of(raw, norm, act, std::nullopt);
  p.y = trained_map("out", out);
  p.weight = depthwise_weight(weight, p.y);
  p.window = window(p.x.raw, p.weight, p.y, stride, padding);
  if (measured) p.statistics = floats("statistics", *measured, {2, p.y.size[1]});
  if (!empty(p.y)) train_kernels().depthwise(p, pool());
}

void depthwise_backward(OptionalTensor dx, OptionalTensor dweight, OptionalTensor sums, OptionalTensor grad,
                        OptionalTensor raw, Tensor norm, std::string act, OptionalTensor gate,
                        OptionalTensor bias, Tensor coefficients, OptionalTensor x, OptionalTensor x_norm,
                        std::string x_act, Tensor weight, std::vector<int64_t> stride,
                        std::vector<int64_t> padding) {
  TrainDepthwiseBackward p;
  p.gradient = gradient_of(grad, raw, norm, act, gate, bias);
  const Tensor4& y = p.gradient.shape();
  p.coefficients = floats("coefficients", coefficients, {3, y.size[1]});
  p.weight = depthwise_weight(weight, y);
  STD_TORCH_CHECK(x || dx, "x or dx must be given");
  STD_TORCH_CHECK(x || !(dweight || x_norm), "x must be given: dweight and x_norm need it");
  if (x) p.x = source_of(*x, x_norm, x_act, std::nullopt);
  if (dx) p.dx = x ? same_map("dx", *dx, p.x.raw) : trained_map("dx", *dx);
  p.window = window(x ? p.x.raw : p.dx, p.weight, y, stride, padding);
  if (dweight) p.dweight = floats("dweight", *dweight, {y.size[1], 1, p.weight.size[2], p.weight.size[3]});
  if (sums) {
    STD_TORCH_CHECK(x_norm && dx, "moments need x_norm and dx");
    p.moments = floats("moments", *sums, {2, y.size[1]});
  }
  if (!empty(y)) train_kernels().depthwise_backward(p, pool());
}

}  // namespace
}  // namespace effnet

STABLE_TORCH_LIBRARY_FRAGMENT(effnet_kernels_cpu, m) {
  m.def("train_statistics(Tensor(a!) out, Tensor raw) -> ()");
  m.def("train_norm(Tensor(a!) out, Tensor statistics, Tensor gamma, Tensor beta, float eps) -> ()");
  m.def("train_coefficients(Tensor(a!) out, Tensor norm, Tensor moments, int count) -> ()");
  m.def("train_pool(Tensor(a!) out, Tensor raw, Tensor? norm, str act) -> ()");
  m.def(
      "train_apply(Tensor(a!) out, Tensor raw, Tensor? norm, str act, Tensor? gate, Tensor? residual) -> ()");
  m.def("train_moments(Tensor(a!) out, " EFFNET_GRADIENT ") -> ()");
  m.def("train_gate_moments(Tensor(a!) out, Tensor grad, Tensor raw, Tensor norm, str act) -> ()");
  m.def("train_raw_gradient(Tensor(a!) out, " EFFNET_GRADIENT ", Tensor coefficients) -> ()");
  m.def(
      "train_depthwise(Tensor(a!) out, Tensor(b!)? statistics, Tensor raw, Tensor? norm, str act, "
      "Tensor weight, int[] stride, int[] padding) -> ()");
  m.def("train_depthwise_backward(Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? moments, " EFFNET_GRADIENT
        ", Tensor coefficients, Tensor? x, Tensor? x_norm, str x_act, Tensor weight, int[] stride, "
        "int[] padding) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cpu, CPU, m) {
  m.impl("train_statistics", TORCH_BOX(&effnet::statistics));
  m.impl("train_norm", TORCH_BOX(&effnet::norm));
  m.impl("train_coefficients", TORCH_BOX(&effnet::coefficients));
  m.impl("train_pool", TORCH_BOX(&effnet::pool_map));
  m.impl("train_apply", TORCH_BOX(&effnet::apply));
  m.impl("train_moments", TORCH_BOX(&effnet::moments));
  m.impl("train_gate_moments", TORCH_BOX(&effnet::gate_moments));
  m.impl("train_raw_gradient", TORCH_BOX(&effnet::raw_gradient));
  m.impl("train_depthwise", TORCH_BOX(&effnet::depthwise));
  m.impl("train_depthwise_backward", TORCH_BOX(&effnet::depthwise_backward));
}
