// What the binding and the CUDA kernels agree on: parameters by value, one launcher per kernel. Plain C++,
// framework-free.
//
// Launchers check what the binding cannot know (limits of the kernel), enqueue on `stream` and return; they
// allocate nothing. An empty problem (a map or batch of size 0) launches nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace effnet::cuda {

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

// Running statistics, [C] each. The epilogue applies gamma / sqrt(var + eps) and what follows from it in
// fp32.
struct BatchNorm {
  Param gamma, beta, mean, var;
  float eps = 0;
};

struct SqueezeExciteWeights {
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
// The same for 16 bits, depthwise_mma.cu: what these two call.
int depthwise_mma_tiles(const DepthwiseParams& p);
Status launch_depthwise_mma(const DepthwiseParams& p, cudaStream_t stream);

// ---- squeeze_excite.cu -----------------------------------------------------------------------------------

struct GateParams {
  DType dtype = DType::kFloat32;  // of the parameters that are not fp32
  const float* sums = nullptr;    // [N, tiles, C]; means are sums over one tile of one pixel
  float* gate = nullptr;          // [N, C]
  SqueezeExciteWeights se;
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

// ---- pointwise_conv_bn_act.cu ----------------------------------------------------------------------------

struct PointwiseParams {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;         // [N, P, C_in]
  const void* weight = nullptr;    // [C_out, C_in] in dtype
  const float* gate = nullptr;     // [N, C_in]; null: none
  const void* residual = nullptr;  // [N, P, C_out]; null: none
  void* y = nullptr;               // [N, P, C_out], with pool [N, C_out]
  BatchNorm bn;
  int act = kIdentity;
  bool pool = false;
  int64_t n = 0, pixels = 0;
  int c_in = 0, c_out = 0;
};
Status launch_pointwise_conv_bn_act(const PointwiseParams& p, cudaStream_t stream);

// ---- expand_depthwise.cu ---------------------------------------------------------------------------------

// Expansion, BatchNorm, act, depthwise convolution, BatchNorm, act in one kernel.
struct ExpandDepthwiseParams {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;              // [N, H, W, C_in]
  const void* expand_weight = nullptr;  // [C_mid, C_in] in dtype
  const void* weight = nullptr;         // [C_mid, KH, KW] in dtype
  void* y = nullptr;                    // [N, OH, OW, C_mid]
  float* sums = nullptr;                // [N, tiles, C_mid], tiles = plan.tiles; null: not wanted
  BatchNorm expand_bn, bn;
  Window window;
  int act = kIdentity;
  int64_t n = 0;
  int h = 0, w = 0, c_in = 0, c_mid = 0, oh = 0, ow = 0;
};

// How the kernel cuts a problem. It depends on the shape of one image and on the GPU, never on the batch.
struct ExpandDepthwisePlan {
  const char* unsupported = nullptr;  // why the kernel does not take the problem; null: it does
  int tiles = 0;                      // pieces of an image over which the sums run
  int shared_bytes = 0;
  // Of fp32 alone:
  int rows = 0;         // output rows of a block
  int images = 0;       // images of a block
  double overhead = 0;  // expanded elements that are computed over those that there are
};
// `shared_limit`: bytes of shared memory that a block may have.
ExpandDepthwisePlan expand_depthwise_plan(const ExpandDepthwiseParams& p, int shared_limit);
Status launch_expand_depthwise(const ExpandDepthwiseParams& p, const ExpandDepthwisePlan& plan,
                               cudaStream_t stream);
// The same for 16 bits, expand_depthwise_mma.cu: what these two call.
ExpandDepthwisePlan expand_depthwise_mma_plan(const ExpandDepthwiseParams& p, int shared_limit);
Status launch_expand_depthwise_mma(const ExpandDepthwiseParams& p, const ExpandDepthwisePlan& plan,
                                   cudaStream_t stream);

// ---- fused_mbconv.cu -------------------------------------------------------------------------------------

struct FusedMBConvParams {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;        // [N, H, W, C_in] at x_stride
  int64_t x_stride[4] = {};       // n, h, w, c in elements
  const void* weight = nullptr;   // [C_mid, KH, KW, C_in] in dtype
  const void* project = nullptr;  // [C_out, C_mid] in dtype; null: none, C_out = C_mid
  void* y = nullptr;              // [N, OH, OW, C_out]
  BatchNorm bn, project_bn;
  Window window;
  int act = kIdentity;
  bool residual = false;  // adds x, then dense and of the size of y
  int64_t n = 0;
  int h = 0, w = 0, c_in = 0, c_mid = 0, c_out = 0, oh = 0, ow = 0;
};
// `shared_limit`: bytes of shared memory that a block may have.
Status launch_fused_mbconv(const FusedMBConvParams& p, int shared_limit, cudaStream_t stream);
// The same for 16 bits and some channels, fused_mbconv_resident.cu: what it calls where that serves.
bool fused_mbconv_resident_serves(const FusedMBConvParams& p, int shared_limit);
Status launch_fused_mbconv_resident(const FusedMBConvParams& p, int shared_limit, cudaStream_t stream);
// The same for 16 bits, 3 input channels and a 3x3 window at stride 2, stem.cu: what it calls where that
// serves.
bool stem_serves(const FusedMBConvParams& p);
Status launch_stem(const FusedMBConvParams& p, cudaStream_t stream);

// ---- train_depthwise.cu, train_depthwise_backward.cu -----------------------------------------------------

// The depthwise convolution in training: y = conv(act(norm(x))).
struct TrainDepthwiseParams {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;        // [N, H, W, C]
  const float* x_norm = nullptr;  // [4, C]: scale, shift, mean, rstd; null: none
  const void* weight = nullptr;   // [C, KH, KW] in dtype
  void* y = nullptr;              // [N, OH, OW, C]
  float* statistics = nullptr;    // [2, C]: mean and biased variance of y; null: not wanted
  float* partial = nullptr;       // scratch, train_depthwise_partial(...) floats; unused without statistics
  int x_act = kIdentity;
  Window window;
  int64_t n = 0;
  int h = 0, w = 0, c = 0, oh = 0, ow = 0;
};

int64_t train_depthwise_partial(const TrainDepthwiseParams& p);
Status launch_train_depthwise(const TrainDepthwiseParams& p, cudaStream_t stream);

// Its backward. The gradient behind the output's norm is
// dz = (grad * gate + bias) * act'(norm(raw)), that of its raw map dy = p * dz + q * (raw - mean) + r.
struct TrainDepthwiseBackwardParams {
  DType dtype = DType::kFloat32;
  const void* grad = nullptr;           // [N, OH, OW, C]; null: zero
  const void* raw = nullptr;            // [N, OH, OW, C]; null where neither act' nor q needs it
  const float* norm = nullptr;          // [4, C]: scale, shift, mean, rstd of the output
  const float* gate = nullptr;          // [N, C]; null: one
  const float* bias = nullptr;          // [N, C]; null: zero
  const float* coefficients = nullptr;  // [3, C]: p, q, r
  const void* x = nullptr;        // raw input, [N, H, W, C]; null where neither dweight nor x_norm needs it
  const float* x_norm = nullptr;  // [4, C] of the input; null: none
  const void* weight = nullptr;   // [C, KH, KW] in dtype
  void* dx = nullptr;             // [N, H, W, C], behind the input's norm; null: not wanted
  void* dweight = nullptr;        // [C, KH, KW] in dtype; null: not wanted
  float* moments = nullptr;       // [2, C]: sum dx, sum dx * xhat; null: not wanted
  float* partial = nullptr;       // scratch, train_depthwise_backward_partial(...) floats
  int act = kIdentity, x_act = kIdentity;
  Window window;
  int64_t n = 0;
  int h = 0, w = 0, c = 0, oh = 0, ow = 0;
};

int64_t train_depthwise_backward_partial(const TrainDepthwiseBackwardParams& p);
Status launch_train_depthwise_backward(const TrainDepthwiseBackwardParams& p, cudaStream_t stream);

}  // namespace effnet::cuda
