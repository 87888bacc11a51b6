// Activations of vectors, and their derivatives.
#pragma once

#include "simd.h"

namespace effnet {
namespace EFFNET_ISA {

#if defined(__AVX512F__)
// The bits of 2^(i/16), less i in the last four bits that the exponent is given; and what rounding left of
// 2^(i/16), relative to it.
alignas(64) constexpr int32_t kExp2[16] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
alignas(64) constexpr float kExp2Low[16] = {0.0f,          4.62855e-08f,  -1.19922e-08f, 4.72978e-08f,
                                            3.19342e-08f,  3.62106e-08f,  -3.09907e-08f, -7.47521e-09f,
                                            1.71143e-08f,  -3.04768e-08f, 5.23333e-09f,  6.10759e-09f,
                                            -1.47196e-08f, -5.25880e-09f, -6.12826e-09f, 5.14061e-09f};
#endif

// x = 1 + exp(-x), at most 0.8 ulp: exp(-x) is never rounded on its own. Infinity where that overflows, NaN
// of NaN. Several vectors at once: one alone is a chain of dependent instructions of 60 cycles, longer than a
// core looks ahead.
template <int kN>
EFFNET_INLINE void one_plus_exp_negated(vf (&x)[kN]) {
#if defined(__AVX512F__)
  // -x log2(e) = n + r with n a multiple of 1/16 and 0 <= r < 1/16. The bits of 2^n are an entry of the
  // table, at n's last four bits, with n added to its exponent. At the lower limit it is infinity, and what r
  // adds is not negative.
  const vf magic = splat(786432.0f);  // 1.5 * 2^19: adding it rounds to a multiple of 1/16, here downwards
  const vf minus_log2e = splat(-1.44269504088896341f), one = splat(1.0f);
  vu t[kN];
  vf power[kN], r[kN], series[kN];
  EFFNET_EACH(i, kN) x[i] = clamp(x[i], -88.7284f, 87.0f);
  EFFNET_EACH(i, kN) {
    t[i] = (vu)_mm512_fmadd_round_ps(x[i], minus_log2e, magic, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  EFFNET_EACH(i, kN) r[i] = _mm512_fmsub_ps(x[i], minus_log2e, (vf)t[i] - magic);  // the product unrounded
  EFFNET_EACH(i, kN) {
    power[i] = (vf)((vu)_mm512_permutexvar_epi32((__m512i)t[i], _mm512_load_si512(kExp2)) + (t[i] << 19));
  }
  EFFNET_EACH(i, kN) r[i] += x[i] * -1.925963033500e-8f;
  EFFNET_EACH(i, kN) series[i] = r[i] * 5.6669876e-2f + 2.40184247e-1f;
  EFFNET_EACH(i, kN) series[i] = series[i] * r[i] + 6.931476e-1f;
  EFFNET_EACH(i, kN) r[i] = r[i] * series[i] + _mm512_permutexvar_ps((__m512i)t[i], load(kExp2Low));
  // exp(-x) = power + power * r. The lesser of 1 and power takes the product first.
  EFFNET_EACH(i, kN) r[i] = power[i] * r[i] + _mm512_min_ps(power[i], one);
  EFFNET_EACH(i, kN) x[i] = _mm512_max_ps(power[i], one) + r[i];
#else
  // Cody-Waite reduction, polynomial of Cephes' expf on [-ln2/2, ln2/2].
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf t[kN], r[kN], series[kN];
  EFFNET_EACH(i, kN) x[i] = clamp(x[i], -89.0f, 89.0f);
  EFFNET_EACH(i, kN) t[i] = x[i] * -1.44269504088896341f + magic;
  EFFNET_EACH(i, kN) {
    const vf n = t[i] - magic;
    r[i] = -x[i] - n * 0.693359375f;
    r[i] = r[i] + n * 2.12194440e-4f;
  }
  EFFNET_EACH(i, kN) {
    const vf r2 = r[i] * r[i];
    const vf p0 = r[i] * 1.9875691500e-4f + 1.3981999507e-3f;
    const vf p1 = r[i] * 8.3334519073e-3f + 4.1665795894e-2f;
    const vf p2 = r[i] * 1.6666665459e-1f + 5.0000001201e-1f;
    series[i] = ((p0 * r2 + p1) * r2 + p2) * r2 + r[i];  // exp(r) - 1
  }
  EFFNET_EACH(i, kN) {
    // Half of 2^n, which is finite as long as half the result is.
    const vi bits = ((vi)t[i] - (vi)magic + 126) << 23;
    const vf power = (vf)(bits & (bits > 0));
    const vf half = power + (power * series[i] + 0.5f);
    x[i] = half + half;
  }
#endif
}

// sigmoid and x * sigmoid(x), at most 2.01 ulp where the result is a normal number
// (tests/ops/test_activations.py); NaN stays NaN, and silu(-inf) is NaN as in stock layers.
template <int kN>
EFFNET_INLINE void sigmoid(vf (&x)[kN]) {
  one_plus_exp_negated(x);
  EFFNET_EACH(i, kN) x[i] = 1.0f / x[i];
}

template <int kN>
EFFNET_INLINE void silu(vf (&x)[kN]) {
  vf divisor[kN];
  EFFNET_EACH(i, kN) divisor[i] = x[i];
  one_plus_exp_negated(divisor);
  EFFNET_EACH(i, kN) x[i] = x[i] / divisor[i];
}

// SiLU for a bfloat16 result, which is rounded to 8 bits: off by 2^-11.1 of it at most (AVX2) or 2^-12.8
// (AVX-512). exp(-x) is 2^n times a cubic, off by 2^-13.7; the quotient is a product with the processor's
// estimate of a reciprocal (2^-11.4, 2^-14), of a sixteenth of 1 + exp(-x), for estimates may be zero where
// they are subnormal.
#if defined(__AVX2__)
constexpr bool kHasShortSilu = true;
template <int kN>
EFFNET_INLINE void short_silu(vf (&x)[kN]) {
  const vf minus_log2e = splat(-1.44269504f), sixteenth = splat(0.0625f);
  vf t[kN], r[kN], power[kN], series[kN];
#if defined(__AVX512F__)
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  EFFNET_EACH(i, kN) t[i] = x[i] * minus_log2e;
  EFFNET_EACH(i, kN) r[i] = _mm512_reduce_ps(t[i], kDown);  // t - floor(t), of infinities 0
  EFFNET_EACH(i, kN) series[i] = r[i] * 4.87653444e-3f + 1.41291964e-2f;
  EFFNET_EACH(i, kN) series[i] = series[i] * r[i] + 4.34895955e-2f;
  EFFNET_EACH(i, kN) series[i] = series[i] * r[i] + 6.24953262e-2f;
  EFFNET_EACH(i, kN) power[i] = _mm512_scalef_ps(series[i], t[i]);
  EFFNET_EACH(i, kN) x[i] = x[i] * sixteenth * (vf)_mm512_rcp14_ps(power[i] + sixteenth);
#else
  // The limits are where n, with the exponent's bias less four, is in the last eight bits: 255, infinity,
  // to 2.
  const vf magic = splat(12583035.0f);  // 1.5 * 2^23 + 123: adding it rounds to an integer
  EFFNET_EACH(i, kN) t[i] = clamp(x[i], -91.4f, 84.0f);
  EFFNET_EACH(i, kN) power[i] = t[i] * minus_log2e + magic;
  EFFNET_EACH(i, kN) r[i] = t[i] * minus_log2e - (power[i] - magic);
  EFFNET_EACH(i, kN) series[i] = r[i] * 5.51714178e-2f + 2.4261117e-1f;
  EFFNET_EACH(i, kN) series[i] = series[i] * r[i] + 6.93261056e-1f;
  EFFNET_EACH(i, kN) series[i] = series[i] * r[i] + 9.99928073e-1f;
  EFFNET_EACH(i, kN) power[i] = (vf)((vi)power[i] << 23);
  EFFNET_EACH(i, kN) x[i] = x[i] * sixteenth * (vf)_mm256_rcp_ps(series[i] * power[i] + sixteenth);
#endif
}
#else
constexpr bool kHasShortSilu = false;
#endif
constexpr int kShortSilu = kHardsigmoid + 1;

// The code of the activation to take where results are of this type.
[[maybe_unused]] static int act_for(DType results, int act) {
  return kHasShortSilu && act == kSilu && results == DType::kBFloat16 ? kShortSilu : act;
}

template <int kAct, int kN>
EFFNET_INLINE void activate(vf (&x)[kN]) {
  if constexpr (kAct == kSilu) return silu(x);
#if defined(__AVX2__)
  if constexpr (kAct == kShortSilu) return short_silu(x);
#endif
  if constexpr (kAct == kSigmoid) return sigmoid(x);
  EFFNET_EACH(i, kN) {
    if constexpr (kAct == kRelu) x[i] = x[i] < 0.0f ? vf{} : x[i];
    if constexpr (kAct == kRelu6) x[i] = clamp(x[i], 0.0f, 6.0f);
    if constexpr (kAct == kHardswish) x[i] = x[i] * clamp(x[i] + 3.0f, 0.0f, 6.0f) / 6.0f;
    if constexpr (kAct == kHardsigmoid) x[i] = clamp(x[i] + 3.0f, 0.0f, 6.0f) / 6.0f;
  }
}

template <int kAct>
EFFNET_INLINE vf activate(vf x) {
  vf alone[1] = {x};
  activate<kAct>(alone);
  return alone[0];
}

// body(Constant<act>()): one compiled loop per activation instead of a branch per vector. kShort: of act_for.
template <bool kShort = false, class Body>
static inline void with_act(int act, const Body& body) {
  if constexpr (kShort && kHasShortSilu)
    if (act == kShortSilu) return body(Constant<kShortSilu>());
  switch (act) {
    case kRelu:
      return body(Constant<kRelu>());
    case kRelu6:
      return body(Constant<kRelu6>());
    case kSilu:
    case kShortSilu:
      return body(Constant<kSilu>());
    case kHardswish:
      return body(Constant<kHardswish>());
    case kSigmoid:
      return body(Constant<kSigmoid>());
    case kHardsigmoid:
      return body(Constant<kHardsigmoid>());
    default:
      return body(Constant<kIdentity>());
  }
}

// put(i, member, act(get(i))) for the vectors i in [0, n); `member` is i's place in its group, which begins
// at a multiple of kVectors.
template <int kAct, class Get, class Put>
EFFNET_INLINE void activate_each(int64_t n, const Get& get, const Put& put) {
  int64_t i = 0;
  const auto run = [&](auto together) {
    constexpr int kN = decltype(together)::value;
    for (; i + kN <= n; i += kN) {
      vf x[kN];
      EFFNET_EACH(j, kN) x[j] = get(i + j);
      activate<kAct>(x);
      EFFNET_EACH(j, kN) put(i + j, j, x[j]);
    }
  };
  run(Constant<kTogether>());
  if constexpr (kTogether > 2) run(Constant<2>());
  run(Constant<1>());
}

// n vectors in place, `step` floats apart.
static inline void activate_all(int act, float* p, int64_t n, int64_t step = kWidth) {
  if (act == kIdentity) return;
  with_act<true>(act, [&](auto tag) {
    activate_each<decltype(tag)::value>(
        n, [&](int64_t i) { return load(p + i * step); },
        [&](int64_t i, int, vf x) { store(p + i * step, x); });
  });
}

// n rows of `vectors` each, one behind the other; those of row i go to to(i), `step` floats apart.
template <class To>
static inline void activate_rows(int act, const float* from, int64_t n, int64_t vectors, int64_t step,
                                 const To& to) {
  with_act<true>(act, [&](auto tag) {
    for (int64_t i = 0; i < n; ++i, from += vectors * kWidth) {
      float* row = to(i);
      activate_each<decltype(tag)::value>(
          vectors, [&](int64_t j) { return load(from + j * kWidth); },
          [&](int64_t j, int, vf x) { store(row + j * step, x); });
    }
  });
}

// An activation and its derivative; at the kinks the choice is torch's.
struct Curve {
  vf value, slope;
};

template <int kAct>
EFFNET_INLINE Curve curve(vf z) {
  const vf zero = {}, one = splat(1.0f);
  if constexpr (kAct == kRelu) return {activate<kRelu>(z), z <= 0.0f ? zero : one};
  if constexpr (kAct == kRelu6) {
    const vf slope = z <= 0.0f ? zero : one;
    return {activate<kRelu6>(z), z >= 6.0f ? zero : slope};
  }
  if constexpr (kAct == kSilu) {
    const vf s = activate<kSigmoid>(z);
    return {z * s, s * (1.0f + z * (1.0f - s))};
  }
  if constexpr (kAct == kHardswish) {
    const vf inner = z / 3.0f + 0.5f, low = z <= -3.0f ? zero : inner;
    return {activate<kHardswish>(z), z >= 3.0f ? one : low};
  }
  return {z, one};
}

}  // namespace EFFNET_ISA
}  // namespace effnet
