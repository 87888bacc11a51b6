// In place of csrc/cpu/instruction_sets.cpp: a library with the two emulated builds of the kernels and no
// other.
#include "cpu/common.h"

namespace effnet {

const char* refusal(int64_t instruction_set) {
  return instruction_set == kAvx512Bf16 || instruction_set == kAmx ? nullptr : "it is not in this library";
}

const Kernels* kernels_of(int64_t instruction_set) {
  return instruction_set == kAmx ? kernels_amx() : kernels_avx512_bf16();
}

}  // namespace effnet
