// The builds of the kernels, one for each instruction set, and the one in use. Which there are csrc/build.py
// says, in ascending order: EFFNET_KERNELS is a list of X(name, features...), EFFNET_TRAIN_KERNELS of
// T(name).
#include "instruction_sets.h"

#include <atomic>
#include <cstring>
#include <string>

#include "train.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace effnet {

#define X(name, ...) const Kernels* kernels_##name();
EFFNET_KERNELS
#undef X

#define T(name) const TrainKernels* train_kernels_##name();
EFFNET_TRAIN_KERNELS
#undef T

namespace {

struct Build {
  const char* name;
  const Kernels* (*kernels)();
  const char* features[12];  // what the processor must have; null behind the last
};

#define X(name, ...) {#name, kernels_##name, {__VA_ARGS__}},
const Build kBuilds[] = {EFFNET_KERNELS};
#undef X
constexpr int64_t kCount = sizeof(kBuilds) / sizeof(Build);

const TrainKernels* train_kernels_named(const char* name) {
#define T(build) \
  if (std::strcmp(name, #build) == 0) return train_kernels_##build();
  EFFNET_TRAIN_KERNELS
#undef T
  return nullptr;
}

#if defined(__x86_64__) || defined(__i386__)
// Where cpuid tells of a feature, and the registers that the operating system must save for it, as bits of
// XCR0.
struct Feature {
  const char* name;
  unsigned leaf, subleaf;
  int at;  // eax, ebx, ecx, edx
  unsigned bit, saved;
};
constexpr unsigned kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
constexpr Feature kFeatures[] = {
    {"fma", 1, 0, 2, 12, kYmm},        {"f16c", 1, 0, 2, 29, kYmm},      {"avx2", 7, 0, 1, 5, kYmm},
    {"avx512f", 7, 0, 1, 16, kZmm},    {"avx512dq", 7, 0, 1, 17, kZmm},  {"avx512bw", 7, 0, 1, 30, kZmm},
    {"avx512vl", 7, 0, 1, 31, kZmm},   {"avx512bf16", 7, 1, 0, 5, kZmm}, {"amx-bf16", 7, 0, 3, 22, kTiles},
    {"amx-tile", 7, 0, 3, 24, kTiles},
};

bool supported(const char* name) {
  unsigned a, b, c, d, saved = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) && (c >> 27 & 1)) asm volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
  for (const Feature& feature : kFeatures) {
    if (std::strcmp(feature.name, name) != 0) continue;
    unsigned registers[4] = {};
    __get_cpuid_count(feature.leaf, feature.subleaf, &registers[0], &registers[1], &registers[2],
                      &registers[3]);
    return (registers[feature.at] >> feature.bit & 1) && (saved & feature.saved) == feature.saved;
  }
  return false;
}
#else
bool supported(const char*) { return false; }
#endif

// Linux saves the tile registers of a process, 8 KiB a thread, only once the process has asked for it.
bool tiles_are_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

// Why it cannot be used here, or nothing.
std::string refusal(const Build& build) {
  bool tiles = false;
  for (const char* const* feature = build.features; *feature != nullptr; ++feature) {
    if (!supported(*feature)) return std::string("the processor lacks ") + *feature;
    tiles |= std::strcmp(*feature, "amx-tile") == 0;
  }
  return tiles && !tiles_are_granted() ? "the operating system refuses the tile registers" : "";
}

int64_t widest() {
  int64_t index = kCount - 1;
  while (index > 0 && !refusal(kBuilds[index]).empty()) --index;
  return index;
}

std::atomic<int64_t> in_use{widest()};

}  // namespace

std::string instruction_sets() {
  std::string names;
  for (const Build& build : kBuilds) names += (names.empty() ? "" : " ") + std::string(build.name);
  return names;
}

int64_t instruction_set() { return in_use.load(std::memory_order_relaxed); }

std::string set_instruction_set(int64_t index) {
  if (index < -1 || index >= kCount) return "there is no such instruction set";
  if (index == -1) index = widest();
  const std::string reason = refusal(kBuilds[index]);
  if (reason.empty()) in_use.store(index);
  return reason;
}

const Kernels& kernels() { return *kBuilds[instruction_set()].kernels(); }

const TrainKernels& train_kernels() {
  int64_t index = instruction_set();
  while (index > 0 && train_kernels_named(kBuilds[index].name) == nullptr) --index;
  return *train_kernels_named(kBuilds[index].name);
}

}  // namespace effnet
