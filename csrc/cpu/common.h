// What the binding and every instruction-set build of the kernels agree on. Framework-free.
#pragma once

#include <atomic>
#include <cstdint>

#include "types.h"

namespace effnet {

// The elements of maps, weights and vectors, beside float. Sums are float.
struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

template <>
inline constexpr DType kDTypeOf<bf16> = DType::kBFloat16;
template <>
inline constexpr DType kDTypeOf<fp16> = DType::kFloat16;

template <class F>
static inline auto with_type(DType dtype, F&& f) {
  return with_type<bf16, fp16, float>(dtype, f);
}

// A strided tensor in memory. Maps are indexed [n][c][h][w], convolution weights [o][i][kh][kw];
// strides are in elements. data == nullptr: not given.
struct Tensor4 {
  void* data = nullptr;
  DType type = DType::kFloat32;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};
};

// A convolution weight in the order that the kernels read, made by Kernels::pack. packed == nullptr: not
// given.
struct Weight {
  const float* packed = nullptr;
  DType type = DType::kFloat32;
  int64_t size[4] = {0, 0, 0, 0};  // [o][i][kh][kw]
};

// A vector of one value per channel.
struct Vector {
  const void* data = nullptr;
  DType type = DType::kFloat32;
  int64_t stride = 1;
};

struct BatchNorm {
  Vector gamma, beta, mean, var;
  float eps = 0;
};

// BatchNorm in inference as y = x * scale + shift, zero beyond the last channel up to a whole slice: made by
// Kernels::fold.
struct Affine {
  const float* scale = nullptr;
  const float* shift = nullptr;
};

// Dense.
struct Matrix {
  const void* data = nullptr;
  DType type = DType::kFloat32;
};

struct SqueezeExciteWeights {
  int64_t channels = 0, reduced = 0;  // channels == 0: not given
  Matrix w_reduce, b_reduce;          // [R][C], [R]
  Matrix w_expand, b_expand;          // [C][R], [C]
  int act = kIdentity, gate = kSigmoid;
};

struct Window {
  int64_t stride_h = 1, stride_w = 1;
  int64_t top = 0, left = 0;  // padding; bottom and right follow from the output's size
};

// Memory, and what its digest was.
struct Chunk {
  uint64_t address, bytes, digest;
};

// The keys of the digests, drawn once for each process.
constexpr int64_t kDigestKeys = 256;
const uint32_t* digest_keys();  // 64-byte aligned

// Chunks to compare while kernels run, each by one thread.
struct Watch {
  const Chunk* chunks;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<bool> same{true};
};

// Runs task(context, 0..n-1), each once, in any order and on any thread.
struct Pool {
  int threads = 1;
  void (*run)(int64_t n, void (*task)(void* context, int64_t i), void* context) = nullptr;
  Watch* watch = nullptr;
};

struct PointwiseParams {
  Tensor4 x, y;  // y: [N][C_out][H][W], or [N][C_out][1][1] when pooled
  Weight weight;
  Tensor4 residual;             // optional
  bool residual_is_x = false;   // in a recorded call: the residual is its x
  const float* gate = nullptr;  // [N][C_in], optional
  Affine bn;
  int act = kIdentity;
  bool pool = false;
};

struct DepthwiseParams {
  Tensor4 x, y;
  Weight weight;
  float* mean = nullptr;  // [N][C], optional
  Affine bn;
  Window window;
  int act = kIdentity;
};

struct GateParams {
  const float* mean = nullptr;  // [N][C]
  float* gate = nullptr;        // [N][C]
  int64_t n = 0;
  SqueezeExciteWeights se;
};

struct SqueezeExciteParams {
  Tensor4 x, y;
  SqueezeExciteWeights se;
};

struct FusedMBConvParams {
  Tensor4 x, y;  // x: any strides
  Weight weight;
  const float* winograd = nullptr;  // the weight once more, made by Kernels::pack_winograd; optional
  Weight project;                   // optional
  Affine bn, project_bn;
  Window window;
  int act = kIdentity;
  bool residual = false;
};

struct MBConvParams {
  Tensor4 x, y;
  Weight expand;  // optional
  Weight weight, project;
  Affine expand_bn, bn, project_bn;
  SqueezeExciteWeights se;  // optional
  Window window;
  int act = kIdentity, project_act = kIdentity;
  bool residual = false;
};

// One build of the kernels. x.type selects the element type of the maps.
struct Kernels {
  int64_t (*packed_floats)(const Tensor4& weight);
  void (*pack)(const Tensor4& weight, float* packed, const Pool&);
  int64_t (*winograd_floats)(const Tensor4& weight, const Window&);  // none: not for this one
  void (*pack_winograd)(const Tensor4& weight, float* packed, const Pool&);
  int64_t (*folded_floats)(int64_t channels);
  Affine (*fold)(const BatchNorm&, int64_t channels, float* folded);
  uint64_t (*digest)(const void* data, int64_t bytes);
  void (*finish)(const Pool&);  // compares what is left of the pool's watch
  void (*pointwise_conv_bn_act)(const PointwiseParams&, const Pool&);
  void (*depthwise_conv_bn_act)(const DepthwiseParams&, const Pool&);
  void (*squeeze_excite_gate)(const GateParams&, const Pool&);
  void (*squeeze_excite)(const SqueezeExciteParams&, const Pool&);
  void (*fused_mbconv)(const FusedMBConvParams&, const Pool&);
  void (*mbconv)(const MBConvParams&, const Pool&);
};

// Scratch memory of one thread. The destructor releases what was taken, the last first. The memory stays
// allocated for the next call: new pages cost more than the kernels that would use them.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* take(int64_t floats);  // 64-byte aligned, uninitialised

 private:
  int64_t block_, used_;
};

}  // namespace effnet
