// Registers the CPU kernels as torch.ops.effnet_kernels_cpu.*, against PyTorch's stable ABI: with the other
// bindings the only files of csrc/ that know torch.
#include "bindings_cpu.h"

#include <atomic>

#include "bindings_cpu_replay.h"
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

const Kernels& kernels() { return *kernels_of(chosen.load(std::memory_order_relaxed)); }

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

// Takes the packed copies of an op's weights one after the other, in the order of its arguments.
class PackedTensors {
 public:
  explicit PackedTensors(const Tensors& tensors) : tensors_(tensors) {}

  Weight weight(const char* name, const Tensor& t, const Tensor4& x, const int64_t (&wanted)[4]) {
    Weight out{tensor4(name, t), nullptr};
    check_size(name, out.source, wanted);
    STD_TORCH_CHECK(out.source.is_bf16 == x.is_bf16, name, " must have the dtype of x");
    STD_TORCH_CHECK(next_ < tensors_.size(), "packed must have a tensor for ", name);
    const Tensor& packed = tensors_[next_++];
    STD_TORCH_CHECK(packed.dim() == 1 && packed.is_contiguous() && !is_bf16("packed", packed) &&
                        packed.size(0) == kernels().packed_floats(out.source),
                    "the packed copy of ", name, " is of another weight or instruction set");
    out.packed = static_cast<float*>(packed.data_ptr());
    return out;
  }

 private:
  const Tensors& tensors_;
  size_t next_ = 0;
};

BatchNorm batch_norm(const char* name, const Tensors& bn, double eps, int64_t channels) {
  STD_TORCH_CHECK(bn.size() == 4, name, " must be gamma, beta, running_mean, running_var; got ", bn.size(),
                  " tensors");
  return {vector(name, bn[0], channels), vector(name, bn[1], channels), vector(name, bn[2], channels),
          vector(name, bn[3], channels), static_cast<float>(eps)};
}

SqueezeExcite squeeze_excite_weights(const Tensors& se, const std::string& act, const std::string& gate,
                                     int64_t channels) {
  STD_TORCH_CHECK(se.size() == 4, "se must be w_reduce, b_reduce, w_expand, b_expand; got ", se.size(),
                  " tensors");
  const int64_t reduced = se[0].dim() > 0 ? se[0].size(0) : 0;
  SqueezeExcite out;
  out.w_reduce = tensor4("se.w_reduce", se[0]);
  out.b_reduce = vector("se.b_reduce", se[1], reduced);
  out.w_expand = tensor4("se.w_expand", se[2]);
  out.b_expand = vector("se.b_expand", se[3], channels);
  check_size("se.w_reduce", out.w_reduce, {reduced, channels, 1, 1});
  check_size("se.w_expand", out.w_expand, {channels, reduced, 1, 1});
  out.act = act_code("se_act", act);
  out.gate = act_code("se_gate", gate);
  return out;
}

float* fp32_matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, " must have shape [", rows,
                  ", ", cols, "]");
  STD_TORCH_CHECK(t.is_contiguous() && !is_bf16(name, t), name, " must be contiguous float32");
  return static_cast<float*>(t.data_ptr());
}

void check_residual(bool residual, const Tensor4& x, const Tensor4& y) {
  if (!residual) return;
  check_nhwc("x with residual", x);
  check_size("out with residual", y, {x.size[0], x.size[1], x.size[2], x.size[3]});
}

void check_out(const Tensor4& y, const Tensor4& x, int64_t channels) {
  STD_TORCH_CHECK(y.is_bf16 == x.is_bf16, "out must have the dtype of x");
  STD_TORCH_CHECK(y.size[0] == x.size[0] && y.size[1] == channels, "out must have shape [", x.size[0], ", ",
                  channels, ", ...]");
}

// ---- ops -------------------------------------------------------------------------------------------------

Tensor pack(Tensor w) {
  Weight p{tensor4("weight", w), nullptr};
  const Tensor packed = torch::stable::new_empty(w, {kernels().packed_floats(p.source)}, ScalarType::Float);
  p.packed = static_cast<float*>(packed.data_ptr());
  if (!empty(p.source)) kernels().pack(p, pool());
  return packed;
}

void pointwise_conv_bn_act(Tensor out, Tensors packed, Tensor x, Tensor w, Tensors bn, double eps,
                           std::string act, OptionalTensor gate, OptionalTensor residual, bool pool_map) {
  PointwiseParams p;
  p.x = map("x", x);
  const int64_t n = p.x.size[0], in = p.x.size[1], channels = w.dim() > 0 ? w.size(0) : 0;
  p.weight = PackedTensors(packed).weight("weight", w, p.x, {channels, in, 1, 1});
  p.bn = batch_norm("bn", bn, eps, channels);
  p.act = act_code("act", act);
  p.pool = pool_map;
  if (pool_map) {
    STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "out must be contiguous [N, C]");
    p.y = {out.data_ptr(), is_bf16("out", out), {out.size(0), out.size(1), 1, 1}, {channels, 1, 1, 1}};
  } else {
    p.y = map("out", out);
    check_size("out", p.y, {n, channels, p.x.size[2], p.x.size[3]});
  }
  check_out(p.y, p.x, channels);
  if (gate) p.gate = fp32_matrix("gate", *gate, n, in);
  if (residual) {
    p.residual = map("residual", *residual);
    check_size("residual", p.residual, {n, channels, p.x.size[2], p.x.size[3]});
    STD_TORCH_CHECK(p.residual.is_bf16 == p.x.is_bf16, "residual must have the dtype of x");
  }
  if (!empty(p.y)) kernels().pointwise_conv_bn_act(p, pool());
}

void depthwise_conv_bn_act(Tensor out, Tensor mean, Tensors packed, Tensor x, Tensor w, Tensors bn,
                           double eps, std::vector<int64_t> stride, std::vector<int64_t> padding,
                           std::string act, bool with_mean) {
  DepthwiseParams p;
  p.x = map("x", x);
  p.y = map("out", out);
  const int64_t channels = p.x.size[1];
  check_out(p.y, p.x, channels);
  STD_TORCH_CHECK(w.dim() == 4, "weight must have 4 dimensions, got ", w.dim());
  p.weight = PackedTensors(packed).weight("weight", w, p.x, {channels, 1, w.size(2), w.size(3)});
  p.window = window(stride, padding, p.x, p.weight.source, p.y);
  p.bn = batch_norm("bn", bn, eps, channels);
  p.act = act_code("act", act);
  if (with_mean) p.mean = fp32_matrix("mean", mean, p.x.size[0], channels);
  if (!empty(p.y)) kernels().depthwise_conv_bn_act(p, pool());
}

void squeeze_excite_gate(Tensor out, Tensor mean, Tensors se, std::string act, std::string gate) {
  GateParams p;
  STD_TORCH_CHECK(mean.dim() == 2, "mean must have shape [N, C]");
  p.n = mean.size(0);
  const int64_t channels = mean.size(1);
  p.se = squeeze_excite_weights(se, act, gate, channels);
  p.mean = fp32_matrix("mean", mean, p.n, channels);
  p.gate = fp32_matrix("out", out, p.n, channels);
  if (p.n * channels > 0) kernels().squeeze_excite_gate(p, pool());
}

void squeeze_excite(Tensor out, Tensor x, Tensors se, std::string act, std::string gate) {
  SqueezeExciteParams p;
  p.x = map("x", x);
  p.y = map("out", out);
  check_out(p.y, p.x, p.x.size[1]);
  check_size("out", p.y, {p.x.size[0], p.x.size[1], p.x.size[2], p.x.size[3]});
  p.se = squeeze_excite_weights(se, act, gate, p.x.size[1]);
  if (!empty(p.y)) kernels().squeeze_excite(p, pool());
}

void fused_mbconv(Tensor out, Tensors packed, Tensor x, Tensor w, Tensors bn, double eps,
                  std::vector<int64_t> stride, std::vector<int64_t> padding, std::string act,
                  OptionalTensor project, Tensors project_bn, double project_eps, bool residual) {
  FusedMBConvParams p;
  p.x = tensor4("x", x);
  p.y = map("out", out);
  STD_TORCH_CHECK(w.dim() == 4, "weight must have 4 dimensions, got ", w.dim());
  const int64_t mid = w.size(0);
  PackedTensors weights(packed);
  p.weight = weights.weight("weight", w, p.x, {mid, p.x.size[1], w.size(2), w.size(3)});
  p.window = window(stride, padding, p.x, p.weight.source, p.y);
  p.bn = batch_norm("bn", bn, eps, mid);
  p.act = act_code("act", act);
  int64_t channels = mid;
  if (project) {
    channels = project->dim() > 0 ? project->size(0) : 0;
    p.project = weights.weight("project_weight", *project, p.x, {channels, mid, 1, 1});
    p.project_bn = batch_norm("project_bn", project_bn, project_eps, channels);
  }
  check_out(p.y, p.x, channels);
  p.residual = residual;
  check_residual(residual, p.x, p.y);
  if (!empty(p.y)) kernels().fused_mbconv(p, pool());
}

void mbconv(Tensor out, Tensors packed, Tensor x, OptionalTensor expand, Tensors expand_bn, double expand_eps,
            Tensor w, Tensors bn, double eps, std::vector<int64_t> stride, std::vector<int64_t> padding,
            std::string act, Tensors se, std::string se_act, std::string se_gate, Tensor project,
            Tensors project_bn, double project_eps, std::string project_act, bool residual) {
  MBConvParams p;
  p.x = map("x", x);
  p.y = map("out", out);
  STD_TORCH_CHECK(w.dim() == 4, "weight must have 4 dimensions, got ", w.dim());
  const int64_t in = p.x.size[1], mid = expand ? w.size(0) : in,
                channels = project.dim() > 0 ? project.size(0) : 0;
  PackedTensors weights(packed);
  if (expand) {
    p.expand = weights.weight("expand_weight", *expand, p.x, {mid, in, 1, 1});
    p.expand_bn = batch_norm("expand_bn", expand_bn, expand_eps, mid);
  }
  p.weight = weights.weight("weight", w, p.x, {mid, 1, w.size(2), w.size(3)});
  p.window = window(stride, padding, p.x, p.weight.source, p.y);
  p.bn = batch_norm("bn", bn, eps, mid);
  if (!se.empty()) p.se = squeeze_excite_weights(se, se_act, se_gate, mid);
  p.project = weights.weight("project_weight", project, p.x, {channels, mid, 1, 1});
  p.project_bn = batch_norm("project_bn", project_bn, project_eps, channels);
  p.act = act_code("act", act);
  p.project_act = act_code("project_act", project_act);
  check_out(p.y, p.x, channels);
  p.residual = residual;
  check_residual(residual, p.x, p.y);
  if (!empty(p.y)) kernels().mbconv(p, pool());
}

}  // namespace

int64_t instruction_set_in_use() { return chosen.load(std::memory_order_relaxed); }

}  // namespace effnet

STABLE_TORCH_LIBRARY(effnet_kernels_cpu, m) {
  m.def("instruction_set() -> int");
  m.def("pack(Tensor weight) -> Tensor");
  m.def("set_instruction_set(int code) -> str");
#define POINTWISE_CONV_BN_ACT \
  "Tensor weight, Tensor[] bn, float eps, str act, Tensor? gate, Tensor? residual, bool pool"
#define FUSED_MBCONV                                                              \
  "Tensor weight, Tensor[] bn, float eps, int[] stride, int[] padding, str act, " \
  "Tensor? project_weight, Tensor[] project_bn, float project_eps, bool residual"
#define MBCONV                                                                              \
  "Tensor? expand_weight, Tensor[] expand_bn, float expand_eps, Tensor weight, "            \
  "Tensor[] bn, float eps, int[] stride, int[] padding, str act, Tensor[] se, str se_act, " \
  "str se_gate, Tensor project_weight, Tensor[] project_bn, float project_eps, "            \
  "str project_act, bool residual"
#define CALL "(Tensor(a!) out, Tensor[] packed, Tensor x, "
#define KEEP "(Tensor[] packed, "
  m.def("pointwise_conv_bn_act" CALL POINTWISE_CONV_BN_ACT ") -> ()");
  m.def("keep_pointwise_conv_bn_act" KEEP POINTWISE_CONV_BN_ACT ") -> int");
  m.def("fused_mbconv" CALL FUSED_MBCONV ") -> ()");
  m.def("keep_fused_mbconv" KEEP FUSED_MBCONV ") -> int");
  m.def("mbconv" CALL MBCONV ") -> ()");
  m.def("keep_mbconv" KEEP MBCONV ") -> int");
  m.def("replay(int call, Tensor(a!) out, Tensor x) -> ()");
  m.def("join(int[] calls, int[] sizes) -> int");
  m.def("forget(int call) -> ()");
  m.def(
      "depthwise_conv_bn_act(Tensor(a!) out, Tensor(b!) mean, Tensor[] packed, Tensor x, Tensor weight, "
      "Tensor[] bn, float eps, int[] stride, int[] padding, str act, bool with_mean) -> ()");
  m.def("squeeze_excite_gate(Tensor(a!) out, Tensor mean, Tensor[] se, str act, str gate) -> ()");
  m.def("squeeze_excite(Tensor(a!) out, Tensor x, Tensor[] se, str act, str gate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&effnet::instruction_set));
  m.impl("set_instruction_set", TORCH_BOX(&effnet::set_instruction_set));
  m.impl("join", TORCH_BOX(&effnet::join));
  m.impl("forget", TORCH_BOX(&effnet::forget));
}

STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_cpu, CPU, m) {
  m.impl("pack", TORCH_BOX(&effnet::pack));
  m.impl("pointwise_conv_bn_act", TORCH_BOX(&effnet::pointwise_conv_bn_act));
  m.impl("depthwise_conv_bn_act", TORCH_BOX(&effnet::depthwise_conv_bn_act));
  m.impl("squeeze_excite_gate", TORCH_BOX(&effnet::squeeze_excite_gate));
  m.impl("squeeze_excite", TORCH_BOX(&effnet::squeeze_excite));
  m.impl("fused_mbconv", TORCH_BOX(&effnet::fused_mbconv));
  m.impl("mbconv", TORCH_BOX(&effnet::mbconv));
  m.impl("keep_pointwise_conv_bn_act", TORCH_BOX(&effnet::Keep<&effnet::pointwise_conv_bn_act>::keep));
  m.impl("keep_fused_mbconv", TORCH_BOX(&effnet::Keep<&effnet::fused_mbconv>::keep));
  m.impl("keep_mbconv", TORCH_BOX(&effnet::Keep<&effnet::mbconv>::keep));
  m.impl("replay", TORCH_BOX(&effnet::replay));
}
