#include <cstdlib>
#include <new>

#include "common.h"

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

}  // namespace

Scratch::Scratch() : block_(arena.current), used_(arena.used) {}

Scratch::~Scratch() {
  arena.current = block_;
  arena.used = used_;
  if (block_ >= 0) return;
  // Nothing is in use: replace several blocks by one that would have held them all.
  int64_t total = 0;
  for (const Block& block : arena.blocks) total += block.size;
  if (total > kKept || arena.blocks[1].data != nullptr) {
    arena.release(0);
    if (total <= kKept) take(total), arena.current = -1, arena.used = 0;
  }
}

float* Scratch::take(int64_t floats) {
  floats = (floats + kAlign - 1) / kAlign * kAlign;
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
    }
    arena.used = 0;
  }
  float* taken = arena.blocks[arena.current].data + arena.used;
  arena.used += floats;
  return taken;
}

}  // namespace effnet
