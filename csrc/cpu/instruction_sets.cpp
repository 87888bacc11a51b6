// What the compiler has built, the processor can run and the operating system allows.
#include "common.h"

#if defined(EFFNET_X86)
#include <cpuid.h>
#endif

#if defined(EFFNET_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace effnet {
namespace {

#if defined(EFFNET_X86)
bool has_f16c() {  // not every compiler's __builtin_cpu_supports knows it
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#if defined(EFFNET_AMX)
// Linux saves the tile registers of a process, 8 KiB a thread, only once the process has asked for it.
bool tiles_are_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

[[maybe_unused]] constexpr const char* kNotBuilt = "the compiler of this build did not know it";

}  // namespace

const char* refusal(int64_t instruction_set) {
#if defined(EFFNET_X86)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (instruction_set) {
    case kGeneric:
      return nullptr;
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()
                 ? nullptr
                 : "the processor lacks one of avx2, fma, f16c";
    case kAvx512:
      return avx512 ? nullptr : "the processor lacks one of avx512f, avx512bw, avx512vl, avx512dq";
    case kAvx512Bf16:
#if defined(EFFNET_AVX512_BF16)
      return avx512 && __builtin_cpu_supports("avx512bf16") ? nullptr : "the processor lacks avx512_bf16";
#else
      return kNotBuilt;
#endif
    case kAmx:
#if defined(EFFNET_AMX)
      if (!avx512 || !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("amx-tile") ||
          !__builtin_cpu_supports("amx-bf16"))
        return "the processor lacks one of avx512_bf16, amx_tile, amx_bf16";
      return tiles_are_granted() ? nullptr : "the operating system refuses the tile registers";
#else
      return kNotBuilt;
#endif
  }
#else
  if (instruction_set == kGeneric) return nullptr;
  if (instruction_set > kGeneric && instruction_set < kInstructionSets) return "the processor is not x86";
#endif
  return "there is no such instruction set";
}

const Kernels* kernels_of(int64_t instruction_set) {
  switch (instruction_set) {
#if defined(EFFNET_X86)
    case kAvx2:
      return kernels_avx2();
    case kAvx512:
      return kernels_avx512();
#endif
#if defined(EFFNET_AVX512_BF16)
    case kAvx512Bf16:
      return kernels_avx512_bf16();
#endif
#if defined(EFFNET_AMX)
    case kAmx:
      return kernels_amx();
#endif
    default:
      return kernels_generic();
  }
}

}  // namespace effnet
