// Compiled once per instruction set; each build gives one table of kernels.
#include "batch_norm.h"
#include "depthwise_conv_bn_act.h"
#include "fused_mbconv.h"
#include "mbconv.h"
#include "pointwise_conv_bn_act.h"
#include "squeeze_excite.h"

#define EFFNET_JOIN_(a, b) a##b
#define EFFNET_JOIN(a, b) EFFNET_JOIN_(a, b)

namespace effnet {

const Kernels* EFFNET_JOIN(kernels_, EFFNET_ISA)() {
  namespace isa = EFFNET_ISA;
  static constexpr Kernels table{
      isa::packed_floats,
      isa::pack,
      isa::winograd_floats,
      isa::pack_winograd,
      isa::folded_floats,
      isa::fold,
      isa::digest,
      isa::finish,
      isa::pointwise_conv_bn_act,
      isa::depthwise_conv_bn_act,
      isa::squeeze_excite_gate,
      isa::squeeze_excite,
      isa::fused_mbconv,
      isa::mbconv,
  };
  return &table;
}

}  // namespace effnet
