// The kernels of a block in training: what the binding and every instruction-set build agree on.
//
// Maps are dense [N][H][W][C]. Vectors, gates and sums are float32. A pointer that may be null says so.
#pragma once

#include "common.h"

namespace effnet {

// BatchNorm and activation on a raw map. vectors: [4][C] scale, shift, mean, rstd; null: nothing to do.
struct TrainNorm {
  const float* vectors = nullptr;
  int act = kIdentity;
};

// A map as its consumer sees it: act(norm(raw)) * gate.
struct TrainSource {
  Tensor4 raw;
  TrainNorm norm;
  const float* gate = nullptr;  // [N][C]; may be null
};

// The gradient behind the norm: dz = (grad * gate + bias) * act'(z), with z = norm(raw).
struct TrainGradient {
  Tensor4 grad;                 // grad.data may be null: zero
  Tensor4 raw;                  // raw.data may be null where neither act' nor the statistics need it
  TrainNorm norm;               // act is identity where grad has act'(z) in it
  const float* gate = nullptr;  // [N][C]; null: one
  const float* bias = nullptr;  // [N][C]; null: zero

  const Tensor4& shape() const { return raw.data != nullptr ? raw : grad; }
};

struct TrainDepthwise {
  TrainSource x;
  Tensor4 weight;
  Window window;
  Tensor4 y;
  float* statistics = nullptr;  // [2][C] mean and biased variance; may be null
};

struct TrainDepthwiseBackward {
  TrainGradient gradient;
  const float* coefficients = nullptr;  // [3][C] p, q, r: dy = p * dz + q * (y - mean) + r
  TrainSource x;                        // x.raw.data may be null where neither dweight nor the norm needs it
  Tensor4 weight;
  Window window;
  Tensor4 dx;                // behind x's norm, if it has one; dx.data may be null
  float* dweight = nullptr;  // [C][KH * KW]; may be null
  float* moments = nullptr;  // [2][C] sum dx, sum dx * xhat; null without norm
};

struct TrainKernels {
  void (*norm)(const float* statistics, const BatchNorm&, int64_t channels, float* out);  // [4][C]
  void (*coefficients)(const float* vectors, const float* moments, int64_t channels, int64_t count,
                       float* out);                               // [3][C] p, q, r
  void (*statistics)(const Tensor4& y, float* out, const Pool&);  // [2][C]
  void (*pool)(const TrainSource&, float* out, const Pool&);      // [N][C]
  void (*apply)(const TrainSource&, const void* residual, const Tensor4& out, const Pool&);
  void (*moments)(const TrainGradient&, float* out, const Pool&);                          // [2][C]
  void (*gate_moments)(const Tensor4& grad, const TrainSource&, float* out, const Pool&);  // [5][N][C]
  void (*raw_gradient)(const TrainGradient&, const float* coefficients, const Tensor4& out, const Pool&);
  void (*depthwise)(const TrainDepthwise&, const Pool&);
  void (*depthwise_backward)(const TrainDepthwiseBackward&, const Pool&);
};

}  // namespace effnet
