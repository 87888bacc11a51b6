// Whether memory has changed: 64 bits of all of it, compared by the threads that compute, between their
// tiles.
#pragma once

#include <algorithm>

#include "simd.h"

namespace effnet {
namespace EFFNET_ISA {

typedef uint64_t vd __attribute__((vector_size(kWidth * 4)));

template <int kBits, class V>
EFFNET_INLINE V rotated(V words) {
  return (words << kBits) | (words >> (64 - kBits));
}

// Every word is mixed in by a bijection, so a change of one word of 64 bits is always seen, and any other
// escapes with a probability of 2^-64. Multiplying carries a difference to higher bits, rotating brings it
// back to lower ones.
template <class V>
EFFNET_INLINE V mixed(V sum, V words) {
  sum ^= words;
  sum += sum << 21;
  return rotated<27>(sum);
}

// The digest of a chunk, taken piece by piece: 64 bits of `bytes` from `data` on.
class Digest {
 public:
  Digest() = default;
  Digest(const void* data, int64_t bytes) : at_(static_cast<const char*>(data)), end_(at_ + bytes) {
    for (int64_t j = 0; j < kSums; ++j)
      sums_[j] = vd{} + 0x9e3779b97f4a7c15u * static_cast<uint64_t>(bytes + j + 1);
  }

  const char* at() const { return at_; }
  int64_t left() const { return end_ - at_; }

  // Takes the next bytes, as many whole blocks as there are in them, or all that is left.
  void take(int64_t bytes) {
    vd sums[kSums];
    std::memcpy(sums, sums_, sizeof(sums));
    // Four words at once, turned so that the same change of several is another one of their sum.
    const auto block = [&](const char* p) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < kSums; ++j) {
        vd words[4];
        std::memcpy(words, p + j * sizeof(words), sizeof(words));
        sums[j] =
            mixed(sums[j], words[0] + rotated<17>(words[1]) + rotated<31>(words[2]) + rotated<47>(words[3]));
      }
    };
    for (; bytes >= kBlock && left() >= kBlock; bytes -= kBlock, at_ += kBlock) block(at_);
    if (left() < kBlock && left() > 0) {
      char rest[kBlock] = {};
      std::memcpy(rest, at_, left());
      block(rest);
      at_ = end_;
    }
    std::memcpy(sums_, sums, sizeof(sums));
  }

  uint64_t value() const {
    const vd all = mixed(sums_[0], sums_[1]);
    uint64_t total = 0;
    for (size_t lane = 0; lane < sizeof(vd) / sizeof(total); ++lane)
      total = mixed<uint64_t>(total, all[lane]);
    return total;
  }

 private:
  static constexpr int64_t kSums = 2, kBlock = kSums * 4 * sizeof(vd);

  const char *at_ = nullptr, *end_ = nullptr;
  vd sums_[kSums];
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
