// Compiled once per instruction set, like kernels.cpp: the kernels of a block in training.
#include "train_depthwise.h"
#include "train_maps.h"

#define EFFNET_JOIN_(a, b) a##b
#define EFFNET_JOIN(a, b) EFFNET_JOIN_(a, b)
// The instance for the element type of a map: float32 or bfloat16, the bindings let no other pass.
#define EFFNET_OF_TYPE(map, kernel, ...) \
  ((map).type == Type::kBFloat16 ? isa::kernel<bf16>(__VA_ARGS__) : isa::kernel<float>(__VA_ARGS__))

namespace effnet {

const TrainKernels* EFFNET_JOIN(train_kernels_, EFFNET_ISA)() {
  namespace isa = EFFNET_ISA;
  static constexpr TrainKernels table{
      isa::train_norm,
      isa::train_coefficients,
      [](const Tensor4& y, float* out, const Pool& pool) {
        EFFNET_OF_TYPE(y, train_statistics, y, out, pool);
      },
      [](const TrainSource& x, float* out, const Pool& pool) {
        EFFNET_OF_TYPE(x.raw, train_pool, x, out, pool);
      },
      [](const TrainSource& x, const void* residual, const Tensor4& out, const Pool& pool) {
        EFFNET_OF_TYPE(x.raw, train_apply, x, residual, out, pool);
      },
      [](const TrainGradient& g, float* out, const Pool& pool) {
        EFFNET_OF_TYPE(g.shape(), train_moments, g, out, pool);
      },
      [](const Tensor4& grad, const TrainSource& x, float* out, const Pool& pool) {
        EFFNET_OF_TYPE(x.raw, train_gate_moments, grad, x, out, pool);
      },
      [](const TrainGradient& g, const float* coefficients, const Tensor4& out, const Pool& pool) {
        EFFNET_OF_TYPE(out, train_raw_gradient, g, coefficients, out, pool);
      },
      [](const TrainDepthwise& p, const Pool& pool) { EFFNET_OF_TYPE(p.y, train_depthwise, p, pool); },
      [](const TrainDepthwiseBackward& p, const Pool& pool) {
        EFFNET_OF_TYPE(p.gradient.shape(), train_depthwise_backward, p, pool);
      },
  };
  return &table;
}

}  // namespace effnet
