// What the products of gemm.h are made of: 32-bit words. A word is one fp32 value or, where the build
// multiplies bf16, a VNNI pair: the values of two neighbouring channels. So a build with bf16 differs in how
// words are made and multiplied, and not in how they are arranged.
//
// Where the number of channels is odd, the last one has the upper half of its word, with zero below: this is
// also its own fp32 value, so the packed weights of a depthwise window, one input channel, are the same in
// every build.
#pragma once

#include <type_traits>

#include "parallel.h"

namespace effnet {
namespace EFFNET_ISA {

// Whether maps and weights of type T are multiplied in VNNI pairs.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool kVnniPairs = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool kVnniPairs = false;
#endif

// The stretches of A that one output row sums over: `taps` of K words, the last one of K_last.
struct Taps {
  int64_t count, stride, k, k_last;
  int64_t total() const { return (count - 1) * k + k_last; }
};

// What a microkernel multiplies.
struct Product {
  const float* a;  // first row
  int64_t a_stride;
  const Taps& taps;
  const float* panel;
  Affine affine;  // of the panel's first channel
  float* c;
  int64_t c_stride;
};

// What is in the words.
template <class T>
using Operand = std::conditional_t<kVnniPairs<T>, bf16, float>;

template <class T>
static inline int64_t words(int64_t channels) {
  return kVnniPairs<T> ? div_up(channels, 2) : channels;
}

// Places for operands in a pixel of that many channels.
template <class T>
static inline int64_t places(int64_t channels) {
  return kVnniPairs<T> ? round_up(channels, 2) : channels;
}

// The place of channel c.
template <class T>
static inline int64_t place(int64_t c, int64_t channels) {
  return kVnniPairs<T> && c + 1 == channels && channels % 2 == 1 ? c + 1 : c;
}

// To every lane.
template <class T>
EFFNET_INLINE vf broadcast(const float* word) {
  if constexpr (!kVnniPairs<T>) return splat(*word);
  int32_t bits;
  std::memcpy(&bits, word, sizeof(bits));  // x may start at any bf16
  return (vf)(bits - vi{});
}

// sum + a * b, or the sum of both products of the pairs.
template <class T>
EFFNET_INLINE vf multiply_add(vf sum, vf a, vf b) {
#if defined(__AVX512BF16__)
  if constexpr (kVnniPairs<T>) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
  return sum + a * b;
}

// Word i of a pixel or of a row of weights, whose channels are `stride` apart.
template <class T>
static inline float word(const T* p, int64_t stride, int64_t i, int64_t channels) {
  if constexpr (kVnniPairs<T>) {
    if (2 * i + 1 == channels) return to_float(p[2 * i * stride]);
    const uint32_t low = p[2 * i * stride].bits, high = p[(2 * i + 1) * stride].bits, bits = high << 16 | low;
    float pair;
    std::memcpy(&pair, &bits, sizeof(pair));
    return pair;
  }
  return to_float(p[i * stride]);
}

// Words [i, i + kWidth), of channels that lie side by side and are not the odd last one.
template <class T>
EFFNET_INLINE vf load_words(const T* p, int64_t i) {
  if constexpr (kVnniPairs<T>) {
    vf pairs;
    std::memcpy(&pairs, p + 2 * i, sizeof(pairs));
    return pairs;
  }
  return load(p + i);
}

// Puts the last of an odd number of channels where its word has it.
template <class T>
EFFNET_INLINE void close_pair(Operand<T>* pixel, int64_t channels) {
  if constexpr (kVnniPairs<T>) {
    if (channels % 2 == 0) return;
    pixel[channels] = pixel[channels - 1];
    pixel[channels - 1] = bf16{0};
  }
}

// A slice of a map [pixels][kSlice], n of its channels used, becomes an operand in place: times the gate, if
// any, and as words. A pixel stays kSlice words from the next.
template <class T>
static inline void to_operand(float* slice, int64_t pixels, int64_t n, const float* gate) {
  vf scale[kVectors];
  for (int64_t j = 0; j < kVectors; ++j) scale[j] = gate ? load(gate + j * kWidth) : splat(1.0f);
  for (int64_t i = 0; i < pixels; ++i, slice += kSlice) {
    vf values[kVectors];
    for (int64_t j = 0; j < kVectors; ++j) values[j] = load(slice + j * kWidth) * scale[j];
    auto* pixel = reinterpret_cast<Operand<T>*>(slice);
    for (int64_t j = 0; j < kVectors; ++j) store(pixel + j * kWidth, values[j]);
    close_pair<T>(pixel, n);
  }
}

}  // namespace EFFNET_ISA
}  // namespace effnet
