// In place of csrc/cpu/instruction_sets.cpp: a library with emulated builds of the kernels and no other.
#include "cpu/common.h"

namespace effnet {

const Kernels* kernels_of(int64_t instruction_set) {
  switch (instruction_set) {
#if defined(EMULATED_AVX512)
    case kAvx512:
      return kernels_avx512();
#endif
#if defined(EMULATED_AVX512_BF16)
    case kAvx512Bf16:
      return kernels_avx512_bf16();
#endif
#if defined(EMULATED_AMX)
    case kAmx:
      return kernels_amx();
#endif
    default:
      return nullptr;
  }
}

const char* refusal(int64_t instruction_set) {
  return kernels_of(instruction_set) == nullptr ? "it is not in this library" : nullptr;
}

}  // namespace effnet
