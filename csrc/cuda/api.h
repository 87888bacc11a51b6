// What the binding and the CUDA kernels agree on: parameters by value, one launcher per kernel. Plain C++, framework-free.
//
// Launchers check what the binding cannot know (limits of the kernel), enqueue on `stream` and return; they
// allocate nothing. An empty problem (a map or batch of size 0) launches nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace effnet::cuda {

// The codes of effnet_kernels/ops/activations.py.
enum Act : int { kIdentity, kRelu, kRelu6, kSilu, kHardswish, kSigmoid, kHardsigmoid };

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// What a launcher answers. On failure `message` says in words what the kernel does not take, or is null where
// CUDA itself refused: cudaGetErrorString(error) then tells why.
struct Status {
  cudaError_t error = cudaSuccess;
  const char* message = nullptr;
  bool ok() const { return error == cudaSuccess; }
};

// A contiguous parameter in fp32, or in the dtype of the map.
struct Param {
  const void* data = nullptr;  // null: not given
  bool is_fp32 = true;
};

// Running statistics, [C] each. The epilogue applies gamma / sqrt(var + eps) and what follows from it in fp32.
struct BatchNorm {
  Param gamma, beta, mean, var;
  float eps = 0;
};

struct SqueezeExcite {
  Param w_reduce, b_reduce;  // [R, C], [R]
  Param w_expand, b_expand;  // [C, R], [C]
  int reduced = 0;           // R
  int act = kIdentity, gate = kSigmoid;
};

// A convolution window over an [H, W] map; padding at the bottom and right follows from the output's size.
struct Window {
  int kh = 1, kw = 1;
  int stride_h = 1, stride_w = 1;
  int top = 0, left = 0;
};

// ---- depthwise_conv_bn_act.cu ----------------------------------------------------------------------------

struct DepthwiseParams {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;       // [N, H, W, C]
  const void* weight = nullptr;  // [C, KH, KW] in dtype
  void* y = nullptr;             // [N, OH, OW, C]
  float* sums = nullptr;         // [N, tiles, C] fp32, tiles = depthwise_tiles(...); null: not wanted
  BatchNorm bn;
  Window window;
  int act = kIdentity;
  int64_t n = 0;
  int h = 0, w = 0, c = 0, oh = 0, ow = 0;
};

// Tiles per image over which the sums run. It depends on the shape alone, never on the batch.
int depthwise_tiles(const DepthwiseParams& p);
Status launch_depthwise_conv_bn_act(const DepthwiseParams& p, cudaStream_t stream);

// ---- squeeze_excite.cu -----------------------------------------------------------------------------------

struct GateParams {
  DType dtype = DType::kFloat32;  // of the parameters that are not fp32
  const float* sums = nullptr;    // [N, tiles, C]; means are sums over one tile of one pixel
  float* gate = nullptr;          // [N, C]
  SqueezeExcite se;
  int64_t n = 0;
  int tiles = 1, c = 0;
  int64_t pixels = 1;  // that the sums of an image are made of
};
Status launch_squeeze_excite_gate(const GateParams& p, cudaStream_t stream);

struct PoolParams {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // [N, P, C]
  float* sums = nullptr;    // [N, pool_tiles(...), C]
  int64_t n = 0, pixels = 0;
  int c = 0;
};
int pool_tiles(const PoolParams& p);
Status launch_pool(const PoolParams& p, cudaStream_t stream);

struct ScaleParams {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;      // [N, P, C]
  const float* gate = nullptr;  // [N, C]
  void* y = nullptr;            // [N, P, C]
  int64_t n = 0, pixels = 0;
  int c = 0;
};
Status launch_scale(const ScaleParams& p, cudaStream_t stream);

struct MeanParams {
  const float* sums = nullptr;  // [N, tiles, C]
  float* mean = nullptr;        // [N, C]
  int64_t n = 0, pixels = 1;
  int tiles = 1, c = 0;
};
Status launch_mean(const MeanParams& p, cudaStream_t stream);

}  // namespace effnet::cuda
