// Compiled once per instruction set, like kernels.cpp: the kernels of a block in training, for float32 and
// bfloat16; the bindings let no other type pass.
#include "train_depthwise.h"
#include "train_maps.h"

#define EFFNET_JOIN_(a, b) a##b
#define EFFNET_JOIN(a, b) EFFNET_JOIN_(a, b)

namespace effnet {

const TrainKernels* EFFNET_JOIN(train_kernels_, EFFNET_ISA)() {
  namespace isa = EFFNET_ISA;
  static constexpr TrainKernels table{
      isa::train_norm,
      isa::train_coefficients,
      [](const Tensor4& y, float* out, const Pool& pool) {
        with_type<bf16, float>(y.type, [&](auto of) { isa::train_statistics<decltype(of)>(y, out, pool); });
      },
      [](const TrainSource& x, float* out, const Pool& pool) {
        with_type<bf16, float>(x.raw.type, [&](auto of) { isa::train_pool<decltype(of)>(x, out, pool); });
      },
      [](const TrainSource& x, const void* residual, const Tensor4& out, const Pool& pool) {
        with_type<bf16, float>(x.raw.type,
                               [&](auto of) { isa::train_apply<decltype(of)>(x, residual, out, pool); });
      },
      [](const TrainGradient& g, float* out, const Pool& pool) {
        with_type<bf16, float>(g.shape().type,
                               [&](auto of) { isa::train_moments<decltype(of)>(g, out, pool); });
      },
      [](const Tensor4& grad, const TrainSource& x, float* out, const Pool& pool) {
        with_type<bf16, float>(x.raw.type,
                               [&](auto of) { isa::train_gate_moments<decltype(of)>(grad, x, out, pool); });
      },
      [](const TrainGradient& g, const float* coefficients, const Tensor4& out, const Pool& pool) {
        with_type<bf16, float>(
            out.type, [&](auto of) { isa::train_raw_gradient<decltype(of)>(g, coefficients, out, pool); });
      },
      [](const TrainDepthwise& p, const Pool& pool) {
        with_type<bf16, float>(p.y.type, [&](auto of) { isa::train_depthwise<decltype(of)>(p, pool); });
      },
      [](const TrainDepthwiseBackward& p, const Pool& pool) {
        with_type<bf16, float>(p.gradient.shape().type,
                               [&](auto of) { isa::train_depthwise_backward<decltype(of)>(p, pool); });
      },
  };
  return &table;
}

}  // namespace effnet
