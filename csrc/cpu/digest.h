// Whether memory has changed: 64 bits of all of it, compared by the threads that compute, between their
// tiles.
#pragma once

#include <algorithm>

#include "simd.h"

namespace effnet {
namespace EFFNET_ISA {

typedef uint64_t vd __attribute__((vector_size(kWidth * 4)));

// Products of the lower halves of the words.
EFFNET_INLINE vd multiply_low(vd a, vd b) {
#if defined(__AVX512F__)
  return (vd)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vd)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The digest of a chunk, taken piece by piece. Of each block the hash NH of UMAC (Black et al. 1999, RFC
// 4418): the sum of (a + key) * (b + key') over pairs of 32-bit words, with keys that are drawn at random for
// each process. Whatever the change of a block is, it goes unseen with a probability of 2^-32 at most. Those
// of a chunk's blocks are mixed one into the other, which keeps them apart.
class Digest {
 public:
  Digest() = default;
  Digest(const void* data, int64_t bytes)
      : at_(static_cast<const char*>(data)), end_(at_ + bytes), total_(static_cast<uint64_t>(bytes)) {}

  const char* at() const { return at_; }
  int64_t left() const { return end_ - at_; }

  // Takes the next bytes, as many whole blocks as there are in them, or all that is left.
  void take(int64_t bytes) {
    for (; bytes >= kBlock && left() >= kBlock; bytes -= kBlock, at_ += kBlock) add(at_);
    if (left() < kBlock && left() > 0) {
      alignas(64) char rest[kBlock] = {};
      std::memcpy(rest, at_, left());
      add(rest);
      at_ = end_;
    }
  }

  uint64_t value() const { return total_; }

 private:
  static constexpr int64_t kBlock = kDigestKeys * sizeof(uint32_t), kStep = sizeof(vd);

  void add(const char* block) {
    vd sums[4] = {};
    const auto* keys = reinterpret_cast<const char*>(digest_keys());
#pragma GCC unroll 4
    for (int64_t i = 0; i < kBlock; i += kStep) {
      vu words, key;
      std::memcpy(&words, block + i, kStep);
      std::memcpy(&key, keys + i, kStep);
      const vd pairs = (vd)(words + key);
      sums[i / kStep % 4] += multiply_low(pairs, pairs >> 32);
    }
    const vd sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    uint64_t hash = 0;
    for (size_t lane = 0; lane < kStep / sizeof(hash); ++lane) hash += sum[lane];
    total_ = (total_ ^ hash) * 0x9e3779b97f4a7c15u;
    total_ ^= total_ >> 32;
  }

  const char *at_ = nullptr, *end_ = nullptr;
  uint64_t total_ = 0;
};

[[maybe_unused]] static uint64_t digest(const void* data, int64_t bytes) {
  Digest all(data, bytes);
  all.take(bytes);
  return all.value();
}

// A thread's share in a Watch: the chunk that it is at, piece by piece. It looks at what the caches were
// asked for when it asks for more.
class Watcher {
 public:
  explicit Watcher(Watch* watch) : before_(current()) {
    if (watch != nullptr) current() = this, watch_ = watch;
  }
  ~Watcher() {
    if (watch_ == nullptr) return;
    while (chunk_ != nullptr) look(chunk_->bytes);
    current() = before_;
  }
  Watcher(const Watcher&) = delete;
  Watcher& operator=(const Watcher&) = delete;

  // What a tile of this thread may fetch, that many bytes; or null.
  static const float* ahead(int64_t bytes) {
    Watcher* const watcher = current();
    return watcher == nullptr ? nullptr : watcher->ask(bytes);
  }

  // Looks at all that nobody has looked at.
  void finish() {
    while (begin()) look(chunk_->bytes);
  }

 private:
  static Watcher*& current() {
    static thread_local Watcher* watcher = nullptr;
    return watcher;
  }

  const float* ask(int64_t bytes) {
    constexpr int64_t kPiece = 4096;
    if (asked_ >= std::min(kPiece, digest_.left())) look(asked_), asked_ = 0;
    if (!begin()) return nullptr;
    const char* const from = digest_.at() + asked_;
    asked_ += bytes;
    return reinterpret_cast<const float*>(from);
  }

  bool begin() {
    if (chunk_ != nullptr) return true;
    const int64_t i = watch_->next.load(std::memory_order_relaxed) < watch_->count
                          ? watch_->next.fetch_add(1, std::memory_order_relaxed)
                          : watch_->count;
    if (i >= watch_->count) return false;
    chunk_ = watch_->chunks + i;
    digest_ = Digest(reinterpret_cast<const void*>(chunk_->address), chunk_->bytes);
    return true;
  }

  void look(int64_t bytes) {
    if (chunk_ == nullptr) return;
    digest_.take(bytes);
    if (digest_.left() > 0) return;
    if (digest_.value() != chunk_->digest) watch_->same.store(false, std::memory_order_relaxed);
    chunk_ = nullptr;
  }

  Watcher* before_;
  Watch* watch_ = nullptr;
  const Chunk* chunk_ = nullptr;
  int64_t asked_ = 0;
  Digest digest_;
};

}  // namespace EFFNET_ISA
}  // namespace effnet
