#pragma once

#include <cstdint>
#include <utility>

namespace cuda_emulation {

// A bijection of the 64-bit numbers that scatters neighbours (splitmix64).
inline std::uint64_t scatter(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// A small fast generator (xorshift64*); the quality of the order of threads is all that hangs on it.
class Random {
 public:
  explicit Random(std::uint64_t seed = 0) : state_(scatter(seed) | 1) {}

  std::uint32_t below(std::uint32_t n) { return static_cast<std::uint32_t>((next() >> 32) * n >> 32); }

  template <typename Iterator>
  void shuffle(Iterator items, std::uint32_t n) {
    for (; n > 1; --n) std::swap(items[n - 1], items[below(n)]);
  }

 private:
  std::uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1d;
  }
  std::uint64_t state_;
};

}  // namespace cuda_emulation
