// Registers the CPU kernels as torch.ops.effnet_kernels_cpu.*, against PyTorch's stable ABI: with the other
// bindings the only files of csrc/ that know torch.
#include "bindings_cpu.h"

#include "bindings_cpu_program.h"

namespace effnet {
namespace {

// ---- arguments -------------------------------------------------------------------------------------------

// A map of these sizes, in the dtype of x.
Tensor4 map_beside(const Tensor4& x, const char* name, const Tensor& t, Sizes sizes) {
  check_sizes(name, t, sizes);
  const Tensor4 out = map(name, t);
  STD_TORCH_CHECK(out.type == x.type, name, " must have the dtype of x");
  return out;
}

void check_residual(bool residual, const Tensor& x, const Tensor& out) {
  if (!residual) return;
  check_nhwc("x with residual", x);
  check_sizes("out with residual", out, x.sizes());
}

// ---- ops -------------------------------------------------------------------------------------------------

PointwiseParams pointwise_conv_bn_act(Constants& constants, Tensor out, Tensor x, Tensor w, Tensors bn,
                                      double eps, std::string act, OptionalTensor gate,
                                      OptionalTensor residual, bool pool_map) {
  PointwiseParams p;
  p.x = map("x", x);
  const int64_t n = p.x.size[0], in = p.x.size[1], channels = first_size(w);
  p.weight = constants.weight("weight", w, p.x, {channels, in, 1, 1});
  p.bn = constants.batch_norm("bn", bn, eps, channels);
  p.act = act_code("act", act);
  p.pool = pool_map;
  if (pool_map) {
    check_sizes("out", out, {n, channels});
    STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
    p.y = output(out);
    STD_TORCH_CHECK(p.y.type == p.x.type, "out must have the dtype of x");
  } else {
    p.y = map_beside(p.x, "out", out, {n, channels, p.x.size[2], p.x.size[3]});
  }
  if (gate) p.gate = floats("gate", *gate, {n, in});
  if (residual) p.residual = map_beside(p.x, "residual", *residual, {n, channels, p.x.size[2], p.x.size[3]});
  return p;
}

DepthwiseParams depthwise_conv_bn_act(Constants& constants, Tensor out, Tensor mean, Tensor x, Tensor w,
                                      Tensors bn, double eps, std::vector<int64_t> stride,
                                      std::vector<int64_t> padding, std::string act, bool with_mean) {
  DepthwiseParams p;
  p.x = map("x", x);
  const int64_t n = p.x.size[0], channels = p.x.size[1];
  check_dim("weight", w, 4);
  p.weight = constants.weight("weight", w, p.x, {channels, 1, w.size(2), w.size(3)});
  const WindowOf window = window_of(p.x.size, p.weight.size, stride, padding);
  p.window = window.window;
  p.y = map_beside(p.x, "out", out, {n, channels, window.oh, window.ow});
  p.bn = constants.batch_norm("bn", bn, eps, channels);
  p.act = act_code("act", act);
  if (with_mean) p.mean = floats("mean", mean, {n, channels});
  return p;
}

void squeeze_excite_gate(Tensor out, Tensor mean, Tensors se, std::string act, std::string gate) {
  const Kernels& k = kernels();
  const SharedPool pool;
  Scratch scratch;
  GateParams p;
  check_dim("mean", mean, 2);
  p.n = mean.size(0);
  const int64_t channels = mean.size(1);
  p.se = Constants(k, pool, scratch).squeeze_excite(se, act, gate, channels);
  p.mean = floats("mean", mean, {p.n, channels});
  p.gate = floats("out", out, {p.n, channels});
  if (p.n * channels > 0) k.squeeze_excite_gate(p, pool);
}

SqueezeExciteParams squeeze_excite(Constants& constants, Tensor out, Tensor x, Tensors se, std::string act,
                                   std::string gate) {
  SqueezeExciteParams p;
  p.x = map("x", x);
  p.y = map_beside(p.x, "out", out, p.x.size);
  p.se = constants.squeeze_excite(se, act, gate, p.x.size[1]);
  return p;
}

FusedMBConvParams fused_mbconv(Constants& constants, Tensor out, Tensor x, Tensor w, Tensors bn, double eps,
                               std::vector<int64_t> stride, std::vector<int64_t> padding, std::string act,
                               OptionalTensor project, Tensors project_bn, double project_eps,
                               bool residual) {
  FusedMBConvParams p;
  p.x = tensor4("x", x);
  check_dim("weight", w, 4);
  const int64_t mid = w.size(0);
  p.weight = constants.weight("weight", w, p.x, {mid, p.x.size[1], w.size(2), w.size(3)});
  const WindowOf window = window_of(p.x.size, p.weight.size, stride, padding);
  p.window = window.window;
  p.winograd = constants.winograd(w, p.window);
  p.bn = constants.batch_norm("bn", bn, eps, mid);
  p.act = act_code("act", act);
  int64_t channels = mid;
  if (project) {
    channels = first_size(*project);
    p.project = constants.weight("project_weight", *project, p.x, {channels, mid, 1, 1});
    p.project_bn = constants.batch_norm("project_bn", project_bn, project_eps, channels);
  }
  p.y = map_beside(p.x, "out", out, {p.x.size[0], channels, window.oh, window.ow});
  p.residual = residual;
  check_residual(residual, x, out);
  return p;
}

MBConvParams mbconv(Constants& constants, Tensor out, Tensor x, OptionalTensor expand, Tensors expand_bn,
                    double expand_eps, Tensor w, Tensors bn, double eps, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::string act, Tensors se, std::string se_act,
                    std::string se_gate, Tensor project, Tensors project_bn, double project_eps,
                    std::string project_act, bool residual) {
  MBConvParams p;
  p.x = map("x", x);
  check_dim("weight", w, 4);
  const int64_t in = p.x.size[1], mid = expand ? w.size(0) : in, channels = first_size(project);
  if (expand) {
    p.expand = constants.weight("expand_weight", *expand, p.x, {mid, in, 1, 1});
    p.expand_bn = constants.batch_norm("expand_bn", expand_bn, expand_eps, mid);
  }
  p.weight = constants.weight("weight", w, p.x, {mid, 1, w.size(2), w.size(3)});
  const WindowOf window = window_of(p.x.size, p.weight.size, stride, padding);
  p.window = window.window;
  p.bn = constants.batch_norm("bn", bn, eps, mid);
  if (!se.empty()) p.se = constants.squeeze_excite(se, se_act, se_gate, mid);
  p.project = constants.weight("project_weight", project, p.x, {channels, mid, 1, 1});
  p.project_bn = constants.batch_norm("project_bn", project_bn, project_eps, channels);
  p.act = act_code("act", act);
  p.project_act = act_code("project_act", project_act);
  p.y = map_beside(p.x, "out", out, {p.x.size[0], channels, window.oh, window.ow});
  p.residual = residual;
  check_residual(residual, x, out);
  return p;
}

}  // namespace

}  // namespace effnet

STABLE_TORCH_LIBRARY(effnet_kernels_cpu, m) {
  m.def("instruction_sets() -> str");
  m.def("instruction_set() -> int");
  m.def("set_instruction_set(int index) -> str");
#define OP(op, arguments)                               \
  m.def(op "(Tensor(a!) " arguments ") -> ()");         \
  m.def("pack_" op "(Tensor " arguments ") -> Tensor"); \
  m.def("keep_" op "(Tensor packed, Tensor " arguments ") -> Tensor")
  OP("pointwise_conv_bn_act", "out, " EFFNET_POINTWISE_CONV_BN_ACT);
  OP("depthwise_conv_bn_act", "out, Tensor(b!) mean, " EFFNET_DEPTHWISE_CONV_BN_ACT);
  OP("squeeze_excite", "out, " EFFNET_SQUEEZE_EXCITE);
  OP("fused_mbconv", "out, " EFFNET_FUSED_MBCONV);
  OP("mbconv", "out, " EFFNET_MBCONV);
  m.def("squeeze_excite_gate(Tensor(a!) out, " EFFNET_SQUEEZE_EXCITE_GATE ") -> ()");
  m.def("digest(Tensor[] sources) -> Tensor");
  m.def("unchanged(Tensor table) -> bool");
  m.def("replay(Tensor program, Tensor table, Tensor(a!) out, Tensor x) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&effnet::instruction_sets));
  m.impl("instruction_set", TORCH_BOX(&effnet::instruction_set));
  m.impl("set_instruction_set", TORCH_BOX(&effnet::set_instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cpu, CPU, m) {
  m.impl("squeeze_excite_gate", TORCH_BOX(&effnet::squeeze_excite_gate));
#define CALLS_OF(op)                                                   \
  m.impl(#op, TORCH_BOX(&effnet::OpCalls<&effnet::op>::call));         \
  m.impl("pack_" #op, TORCH_BOX(&effnet::OpCalls<&effnet::op>::pack)); \
  m.impl("keep_" #op, TORCH_BOX(&effnet::OpCalls<&effnet::op>::keep))
  CALLS_OF(pointwise_conv_bn_act);
  CALLS_OF(depthwise_conv_bn_act);
  CALLS_OF(squeeze_excite);
  CALLS_OF(fused_mbconv);
  CALLS_OF(mbconv);
  m.impl("digest", TORCH_BOX(&effnet::digest));
  m.impl("unchanged", TORCH_BOX(&effnet::unchanged));
  m.impl("replay", TORCH_BOX(&effnet::replay));
}
