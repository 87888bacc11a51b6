#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <random>

#include "common.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace effnet {
namespace {

constexpr int kMaxBlocks = 32;
constexpr int64_t kAlign = 16;                // floats: one cache line
constexpr int64_t kSmallest = 1 << 16;        // floats: 256 KiB
constexpr int64_t kKept = int64_t{16} << 20;  // floats: 64 MiB stay with a thread between calls

struct Block {
  float* data = nullptr;
  int64_t size = 0;
};

// A stack of blocks; only the last one in use is partly free.
struct Arena {
  Block blocks[kMaxBlocks];
  int64_t current = -1, used = 0;

  ~Arena() { release(0); }

  void release(int first) {
    for (int i = first; i < kMaxBlocks; ++i) {
      std::free(blocks[i].data);
      blocks[i] = Block{};
    }
  }
};

thread_local Arena arena;

// Under AddressSanitizer nothing may touch what is not taken, there is such memory behind everything taken,
// and what is taken is NaN until it is written.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGap = kAlign;
void unseal(float* p, int64_t floats) {
  __asan_unpoison_memory_region(p, floats * sizeof(float));
  std::fill_n(p, floats, std::numeric_limits<float>::quiet_NaN());
}
void seal(float* p, int64_t floats) { __asan_poison_memory_region(p, floats * sizeof(float)); }
#else
constexpr int64_t kGap = 0;
void unseal(float*, int64_t) {}
void seal(float*, int64_t) {}
#endif

}  // namespace

Scratch::Scratch() : block_(arena.current), used_(arena.used) {}

Scratch::~Scratch() {
  for (int64_t i = std::max<int64_t>(block_, 0); i <= arena.current; ++i) {
    const int64_t kept = i == block_ ? used_ : 0;
    seal(arena.blocks[i].data + kept, arena.blocks[i].size - kept);
  }
  arena.current = block_;
  arena.used = used_;
  if (block_ >= 0) return;
  // Nothing is in use: replace several blocks by one that would have held them all.
  int64_t total = 0;
  for (const Block& block : arena.blocks) total += block.size;
  if (total > kKept || arena.blocks[1].data != nullptr) {
    arena.release(0);
    if (total <= kKept) seal(take(total), total), arena.current = -1, arena.used = 0;
  }
}

float* Scratch::take(int64_t floats) {
  const int64_t wanted = floats;
  floats = (floats + kAlign - 1) / kAlign * kAlign + kGap;
  if (arena.current < 0 || arena.used + floats > arena.blocks[arena.current].size) {
    if (arena.current + 1 >= kMaxBlocks) throw std::bad_alloc();
    Block& next = arena.blocks[++arena.current];
    if (next.size < floats) {
      std::free(next.data);
      next.size = floats > kSmallest ? floats : kSmallest;
      next.data = static_cast<float*>(std::aligned_alloc(64, next.size * sizeof(float)));
      if (next.data == nullptr) {
        next.size = 0;
        throw std::bad_alloc();
      }
      seal(next.data, next.size);
    }
    arena.used = 0;
  }
  float* taken = arena.blocks[arena.current].data + arena.used;
  arena.used += floats;
  unseal(taken, wanted);
  return taken;
}

const uint32_t* digest_keys() {
  struct alignas(64) Keys {
    uint32_t words[kDigestKeys];
    Keys() {
      std::random_device random;
      for (uint32_t& word : words) word = random();
    }
  };
  static const Keys keys;
  return keys.words;
}

}  // namespace effnet
