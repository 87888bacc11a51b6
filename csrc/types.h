// What the kernels of all devices and their bindings share: the types of elements and the activations. Knows
// no framework.
#pragma once

namespace effnet {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// The DType of an element type. Each device has types of its own for 16 bits, and specialises this for them.
template <class T>
constexpr DType kDTypeOf = DType::kFloat32;

// Calls f(T()) for the T, of those listed, that `dtype` names; the last one stands for all others.
template <class T, class... Others, class F>
static inline auto with_type(DType dtype, F&& f) {
  if constexpr (sizeof...(Others) == 0) {
    return f(T());
  } else {
    if (dtype == kDTypeOf<T>) return f(T());
    return with_type<Others...>(dtype, f);
  }
}

// Codes and names of effnet_kernels/ops/activations.py; tests/test_structure.py compares them.
enum Act : int { kIdentity, kRelu, kRelu6, kSilu, kHardswish, kSigmoid, kHardsigmoid };
constexpr const char* kActNames[] = {"identity",  "relu",    "relu6",      "silu",
                                     "hardswish", "sigmoid", "hardsigmoid"};

}  // namespace effnet
