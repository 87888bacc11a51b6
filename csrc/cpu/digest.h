// Whether memory has changed: the threads that compute also digest it, between two products, and compare the
// 64 bits of each chunk with those of before.
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

// A bijection of both: multiplying carries a difference to higher bits, rotating brings it back to lower
// ones.
template <class V>
EFFNET_INLINE V mixed(V sum, V words) {
  sum ^= words;
  sum += sum << 21;
  return (sum << 27) | (sum >> 37);
}

// The digest of a chunk, taken piece by piece. Of each block, lane by lane, the hash NH of UMAC (Black et al.
// 1999, RFC 4418): the sum of (a + key) * (b + key') over pairs of 32-bit words, with keys that are drawn at
// random for each process. Whatever the change of a block is, it goes unseen with a probability of 2^-32 at
// most. The hashes of a chunk's blocks are mixed one into the other, which keeps them apart.
class Digest {
 public:
  Digest() = default;
  Digest(const void* data, int64_t bytes)
      : at_(static_cast<const char*>(data)), end_(at_ + bytes), keys_(digest_keys()), total_{} {}

  const char* at() const { return at_; }
  int64_t left() const { return end_ - at_; }

  // Takes the next bytes, as many whole blocks as there are in them, or all that is left.
  void take(int64_t bytes) {
    vd total = total_;
    for (; bytes >= kBlock && left() >= kBlock; bytes -= kBlock, at_ += kBlock)
      total = mixed(total, hash(at_));
    if (left() < kBlock && left() > 0) {
      alignas(64) char rest[kBlock] = {};
      std::memcpy(rest, at_, left());
      total = mixed(total, hash(rest));
      at_ = end_;
    }
    total_ = total;
  }

  uint64_t value() const {
    uint64_t all = 0;
    for (size_t lane = 0; lane < sizeof(vd) / sizeof(all); ++lane) all = mixed<uint64_t>(all, total_[lane]);
    return all;
  }

 private:
  static constexpr int64_t kBlock = kDigestKeys * sizeof(uint32_t), kStep = sizeof(vd);

  vd hash(const char* block) const {
    vd sums[4] = {};
#pragma GCC unroll 16
    for (int64_t i = 0; i < kBlock / kStep; ++i) {
      vu words, key;
      std::memcpy(&words, block + i * kStep, kStep);
      std::memcpy(&key, keys_ + i * kStep / sizeof(uint32_t), kStep);
      const vd pairs = (vd)(words + key);
      sums[i % 4] += multiply_low(pairs, pairs >> 32);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  const char *at_ = nullptr, *end_ = nullptr;
  const uint32_t* keys_ = nullptr;
  vd total_;
};

[[maybe_unused]] static uint64_t digest(const void* data, int64_t bytes) {
  Digest all(data, bytes);
  all.take(bytes);
  return all.value();
}

// A thread's part of a Watch: one chunk at a time, piece by piece. A piece is prefetched first, and digested
// when the next one is asked for.
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

  // What a product of this thread may prefetch, that many bytes; or null.
  static const float* ahead(int64_t bytes) {
    Watcher* const watcher = current();
    return watcher == nullptr ? nullptr : watcher->ask(bytes);
  }

  // Digests all chunks that no thread has begun.
  void finish() {
    while (begin()) look(chunk_->bytes);
  }

 private:
  static Watcher*& current() {
    static thread_local Watcher* watcher = nullptr;
    return watcher;
  }

  const float* ask(int64_t bytes) {
    // What was asked for last is still on its way.
    constexpr int64_t kPiece = 4096;
    if (asked_ >= digest_.left()) look(digest_.left()), asked_ = 0;
    if (asked_ >= 2 * kPiece) look(kPiece), asked_ -= kPiece;
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
