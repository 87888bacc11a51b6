// Registers the CUDA kernels of a block in training as torch.ops.effnet_kernels_cuda.train_*.
#include "bindings_cuda.h"

namespace effnet::cuda {
namespace {

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

// The gradient is that of effnet_kernels/ops/train_block.py: grad, raw, the norm's vectors, its
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

STABLE_TORCH_LIBRARY_FRAGMENT(effnet_kernels_cuda, m) {
  m.def(
      "train_depthwise(Tensor(a!) out, Tensor(b!)? statistics, Tensor x, Tensor? x_norm, str x_act, "
      "Tensor weight, int[] stride, int[] padding) -> ()");
  m.def(
      "train_depthwise_backward(Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? moments, Tensor? grad, "
      "Tensor? raw, Tensor norm, str act, Tensor? gate, Tensor? bias, Tensor coefficients, Tensor? x, "
      "Tensor? x_norm, str x_act, Tensor weight, int[] size, int[] stride, int[] padding) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cuda, CUDA, m) {
  m.impl("train_depthwise", TORCH_BOX(&effnet::cuda::train_depthwise));
  m.impl("train_depthwise_backward", TORCH_BOX(&effnet::cuda::train_depthwise_backward));
}
