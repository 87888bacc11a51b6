// Registers the CPU kernels as torch.ops.effnet_kernels_cpu.*, against PyTorch's stable ABI: with the other
// bindings the only files of csrc/ that know torch.
#include "bindings_cpu.h"

#include <atomic>

#include "bindings_cpu_program.h"
#include "cpu/train.h"

namespace effnet {
namespace {

// ---- instruction set -------------------------------------------------------------------------------------

int64_t widest() {
  int64_t set = kInstructionSets - 1;
  while (refusal(set) != nullptr) --set;
  return set;
}

std::atomic<int64_t> chosen{widest()};

// Codes count native.INSTRUCTION_SETS: 0 is "auto", the others follow one below.
int64_t instruction_set() { return chosen.load() + 1; }

// The reason why not, or nothing.
std::string set_instruction_set(int64_t code) {
  const int64_t set = code == 0 ? widest() : code - 1;
  if (const char* reason = refusal(set)) return reason;
  chosen.store(set);
  return "";
}

// ---- arguments -------------------------------------------------------------------------------------------

float* fp32_matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, " must have shape [", rows,
                  ", ", cols, "]");
  STD_TORCH_CHECK(t.is_contiguous() && type_of(name, t) == DType::kFloat32, name,
                  " must be contiguous float32");
  return static_cast<float*>(t.data_ptr());
}

void check_residual(bool residual, const Tensor4& x, const Tensor4& y) {
  if (!residual) return;
  check_nhwc("x with residual", x);
  check_size("out with residual", y, {x.size[0], x.size[1], x.size[2], x.size[3]});
}

void check_out(const Tensor4& y, const Tensor4& x, int64_t channels) {
  STD_TORCH_CHECK(y.type == x.type, "out must have the dtype of x");
  STD_TORCH_CHECK(y.size[0] == x.size[0] && y.size[1] == channels, "out must have shape [", x.size[0], ", ",
                  channels, ", ...]");
}

// ---- ops -------------------------------------------------------------------------------------------------

PointwiseParams pointwise_conv_bn_act(Constants& constants, Tensor out, Tensor x, Tensor w, Tensors bn,
                                      double eps, std::string act, OptionalTensor gate,
                                      OptionalTensor residual, bool pool_map) {
  PointwiseParams p;
  p.x = map("x", x);
  const int64_t n = p.x.size[0], in = p.x.size[1], channels = w.dim() > 0 ? w.size(0) : 0;
  p.weight = constants.weight("weight", w, p.x, {channels, in, 1, 1});
  p.bn = constants.batch_norm("bn", bn, eps, channels);
  p.act = act_code("act", act);
  p.pool = pool_map;
  if (pool_map) {
    STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "out must be contiguous [N, C]");
    p.y = output(out);
  } else {
    p.y = map("out", out);
    check_size("out", p.y, {n, channels, p.x.size[2], p.x.size[3]});
  }
  check_out(p.y, p.x, channels);
  if (gate) p.gate = fp32_matrix("gate", *gate, n, in);
  if (residual) {
    p.residual = map("residual", *residual);
    check_size("residual", p.residual, {n, channels, p.x.size[2], p.x.size[3]});
    STD_TORCH_CHECK(p.residual.type == p.x.type, "residual must have the dtype of x");
  }
  return p;
}

DepthwiseParams depthwise_conv_bn_act(Constants& constants, Tensor out, Tensor mean, Tensor x, Tensor w,
                                      Tensors bn, double eps, std::vector<int64_t> stride,
                                      std::vector<int64_t> padding, std::string act, bool with_mean) {
  DepthwiseParams p;
  p.x = map("x", x);
  p.y = map("out", out);
  const int64_t channels = p.x.size[1];
  check_out(p.y, p.x, channels);
  STD_TORCH_CHECK(w.dim() == 4, "weight must have 4 dimensions, got ", w.dim());
  p.weight = constants.weight("weight", w, p.x, {channels, 1, w.size(2), w.size(3)});
  p.window = window(stride, padding, p.x, p.weight, p.y);
  p.bn = constants.batch_norm("bn", bn, eps, channels);
  p.act = act_code("act", act);
  if (with_mean) p.mean = fp32_matrix("mean", mean, p.x.size[0], channels);
  return p;
}

void squeeze_excite_gate(Tensor out, Tensor mean, Tensors se, std::string act, std::string gate) {
  const Kernels& k = kernels();
  const SharedPool pool;
  Scratch scratch;
  GateParams p;
  STD_TORCH_CHECK(mean.dim() == 2, "mean must have shape [N, C]");
  p.n = mean.size(0);
  const int64_t channels = mean.size(1);
  p.se = Constants(k, pool, scratch).squeeze_excite(se, act, gate, channels);
  p.mean = fp32_matrix("mean", mean, p.n, channels);
  p.gate = fp32_matrix("out", out, p.n, channels);
  if (p.n * channels > 0) k.squeeze_excite_gate(p, pool);
}

SqueezeExciteParams squeeze_excite(Constants& constants, Tensor out, Tensor x, Tensors se, std::string act,
                                   std::string gate) {
  SqueezeExciteParams p;
  p.x = map("x", x);
  p.y = map("out", out);
  check_out(p.y, p.x, p.x.size[1]);
  check_size("out", p.y, {p.x.size[0], p.x.size[1], p.x.size[2], p.x.size[3]});
  p.se = constants.squeeze_excite(se, act, gate, p.x.size[1]);
  return p;
}

FusedMBConvParams fused_mbconv(Constants& constants, Tensor out, Tensor x, Tensor w, Tensors bn, double eps,
                               std::vector<int64_t> stride, std::vector<int64_t> padding, std::string act,
                               OptionalTensor project, Tensors project_bn, double project_eps,
                               bool residual) {
  FusedMBConvParams p;
  p.x = tensor4("x", x);
  p.y = map("out", out);
  STD_TORCH_CHECK(w.dim() == 4, "weight must have 4 dimensions, got ", w.dim());
  const int64_t mid = w.size(0);
  p.weight = constants.weight("weight", w, p.x, {mid, p.x.size[1], w.size(2), w.size(3)});
  p.window = window(stride, padding, p.x, p.weight, p.y);
  p.winograd = constants.winograd(w, p.window);
  p.bn = constants.batch_norm("bn", bn, eps, mid);
  p.act = act_code("act", act);
  int64_t channels = mid;
  if (project) {
    channels = project->dim() > 0 ? project->size(0) : 0;
    p.project = constants.weight("project_weight", *project, p.x, {channels, mid, 1, 1});
    p.project_bn = constants.batch_norm("project_bn", project_bn, project_eps, channels);
  }
  check_out(p.y, p.x, channels);
  p.residual = residual;
  check_residual(residual, p.x, p.y);
  return p;
}

MBConvParams mbconv(Constants& constants, Tensor out, Tensor x, OptionalTensor expand, Tensors expand_bn,
                    double expand_eps, Tensor w, Tensors bn, double eps, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::string act, Tensors se, std::string se_act,
                    std::string se_gate, Tensor project, Tensors project_bn, double project_eps,
                    std::string project_act, bool residual) {
  MBConvParams p;
  p.x = map("x", x);
  p.y = map("out", out);
  STD_TORCH_CHECK(w.dim() == 4, "weight must have 4 dimensions, got ", w.dim());
  const int64_t in = p.x.size[1], mid = expand ? w.size(0) : in,
                channels = project.dim() > 0 ? project.size(0) : 0;
  if (expand) {
    p.expand = constants.weight("expand_weight", *expand, p.x, {mid, in, 1, 1});
    p.expand_bn = constants.batch_norm("expand_bn", expand_bn, expand_eps, mid);
  }
  p.weight = constants.weight("weight", w, p.x, {mid, 1, w.size(2), w.size(3)});
  p.window = window(stride, padding, p.x, p.weight, p.y);
  p.bn = constants.batch_norm("bn", bn, eps, mid);
  if (!se.empty()) p.se = constants.squeeze_excite(se, se_act, se_gate, mid);
  p.project = constants.weight("project_weight", project, p.x, {channels, mid, 1, 1});
  p.project_bn = constants.batch_norm("project_bn", project_bn, project_eps, channels);
  p.act = act_code("act", act);
  p.project_act = act_code("project_act", project_act);
  check_out(p.y, p.x, channels);
  p.residual = residual;
  check_residual(residual, p.x, p.y);
  return p;
}

}  // namespace

int64_t instruction_set_in_use() { return chosen.load(std::memory_order_relaxed); }

const Kernels& kernels() { return *kernels_of(instruction_set_in_use()); }

}  // namespace effnet

STABLE_TORCH_LIBRARY(effnet_kernels_cpu, m) {
  m.def("instruction_set() -> int");
  m.def("set_instruction_set(int code) -> str");
#define OP(op, arguments)                               \
  m.def(op "(Tensor(a!) " arguments ") -> ()");         \
  m.def("pack_" op "(Tensor " arguments ") -> Tensor"); \
  m.def("keep_" op "(Tensor packed, Tensor " arguments ") -> Tensor")
  OP("pointwise_conv_bn_act",
     "out, Tensor x, Tensor weight, Tensor[] bn, float eps, str act, Tensor? gate, Tensor? residual, bool "
     "pool");
  OP("depthwise_conv_bn_act",
     "out, Tensor(b!) mean, Tensor x, Tensor weight, Tensor[] bn, float eps, int[] stride, int[] padding, "
     "str act, bool with_mean");
  OP("squeeze_excite", "out, Tensor x, Tensor[] se, str act, str gate");
  OP("fused_mbconv",
     "out, Tensor x, Tensor weight, Tensor[] bn, float eps, int[] stride, int[] padding, str act, "
     "Tensor? project_weight, Tensor[] project_bn, float project_eps, bool residual");
  OP("mbconv",
     "out, Tensor x, Tensor? expand_weight, Tensor[] expand_bn, float expand_eps, Tensor weight, "
     "Tensor[] bn, float eps, int[] stride, int[] padding, str act, Tensor[] se, str se_act, "
     "str se_gate, Tensor project_weight, Tensor[] project_bn, float project_eps, "
     "str project_act, bool residual");
  m.def("squeeze_excite_gate(Tensor(a!) out, Tensor mean, Tensor[] se, str act, str gate) -> ()");
  m.def("digest(Tensor[] sources) -> Tensor");
  m.def("unchanged(Tensor table) -> bool");
  m.def("replay(Tensor program, Tensor table, Tensor(a!) out, Tensor x) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&effnet::instruction_set));
  m.impl("set_instruction_set", TORCH_BOX(&effnet::set_instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cpu, CPU, m) {
  m.impl("squeeze_excite_gate", TORCH_BOX(&effnet::squeeze_excite_gate));
#define CALLS_OF(op)                                              \
  m.impl(#op, TORCH_BOX(&effnet::Op<&effnet::op>::call));         \
  m.impl("pack_" #op, TORCH_BOX(&effnet::Op<&effnet::op>::pack)); \
  m.impl("keep_" #op, TORCH_BOX(&effnet::Op<&effnet::op>::keep))
  CALLS_OF(pointwise_conv_bn_act);
  CALLS_OF(depthwise_conv_bn_act);
  CALLS_OF(squeeze_excite);
  CALLS_OF(fused_mbconv);
  CALLS_OF(mbconv);
  m.impl("digest", TORCH_BOX(&effnet::digest));
  m.impl("unchanged", TORCH_BOX(&effnet::unchanged));
  m.impl("replay", TORCH_BOX(&effnet::replay));
}
