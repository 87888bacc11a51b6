// fused_mbconv of a stem in 16 bits: act(bn(conv(x))) with a 3x3 window at stride 2 over 3 channels, on
// tensor cores.
//
// Designed for 2 (3 P_in + P_out C_out) bytes from and to DRAM. A window is 27 values. The 9 of a row lie
// side by side where x is NHWC, and those of the next output 6 elements further, so that pairs of them go
// straight from shared memory into a product: 8 of a row's values are four pairs, for the four lanes that
// share a pixel, and the three values that are left over are a pair with a zero in three of the lanes. With
// that a window is 32 values, two mma.m16n8k16. Places without a value are zeros in both factors: what is not
// finite reaches those outputs whose window has it.
//
// A warp works by itself, on 16 neighbouring output columns and all output channels, and slides down the map.
// Rows of x come through a ring in shared memory of its own, as NHWC whatever x is: where rows of x are made
// of aligned 16 bytes, by asynchronous copies, two output rows ahead; else element by element, at any
// strides, through registers, one output row ahead. Weights and BatchNorm stay in registers.
//
// The columns of the products are output channels in such an order that what a lane has of four blocks of
// them is 8 neighbouring channels: 16 bytes, stored without an exchange between lanes.
//
// Prediction for 3-32 at 224x224, batch 128, on an H100: 60 us, three quarters of a copy's bandwidth. Its 141
// MB take 47 us at 3.0 TB/s; 200 instructions of a warp for 16 pixels and 32 channels (235 where x comes
// element by element) are 22 us (26 us) of the schedulers' time, two special functions for each SiLU 29 us.
// With 24 or 40 channels a part of y leaves as 8 and 4 bytes, in 1.7 and 1.4 times as many sectors as 16
// bytes each would need; an exchange between lanes would take more instructions than the products.
//
// Which values are multiplied together depends on the padding at the left alone, so that results have the
// same bits whatever layout, alignment and batch are.
#include <algorithm>
#include <cstdint>

#include "cuda/common.cuh"

namespace effnet::cuda {
namespace {

constexpr int kWarps = 4;                     // of a block, which share nothing
constexpr int kWide = 16;                     // output columns of a segment
constexpr int kRun = 3 * (2 * kWide + 1);     // elements of a row of x under a segment
constexpr int kRow = (kRun + 7 + 7) / 8 * 8;  // from one row to the next in the ring, in elements
constexpr int kPair = 2 * kRow;               // a further output row needs two further rows of x
constexpr int kRing = 4;                      // pairs
constexpr int kSharedBytes = kWarps * kRing * kPair * 2;
// Lane 4g + t reads the words 3g + t of a row, and 3g of row t: in different banks.
static_assert(kRow / 2 % 32 == 24 && kRing * kPair / 2 % 32 == 0);

// Where the warps lie; the same for a whole launch.
struct Args {
  FusedMBConvParams p;
  bool vector_out;  // pixels of y are made of aligned 16 bytes
  int skew;         // elements before a segment's first column, in a row of the ring
  int segments;     // that cover a row of y
  int bands, rows;  // that cover a column; output rows of each
  unsigned places;  // of a warp: segments of bands
  unsigned warps;   // each takes one place after the other, so that its weights are loaded once
  // Bytes from one element of x to the others of its pair of rows, [row, channel]; to the next pair.
  int64_t x_steps[6], x_pair;
  int64_t y_row, y_eight;  // elements to the next row of y, and to the eighth pixel further
};

__device__ __forceinline__ const uint16_t* bytes_behind(const uint16_t* from, int64_t bytes) {
  return reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(from) + bytes);
}

// ---- rows of x into the ring -----------------------------------------------------------------------------

// Both ways bring pairs of rows, the first of which ends with the first row under the band's windows.
struct Rows {
  int next;        // row of x, of the first row of the next pair
  int begin, end;  // that the place needs and that there are

  __device__ __forceinline__ Rows(const FusedMBConvParams& p, int first_row, int rows)
      : next(2 * first_row - p.window.top - 1), begin(max(next + 1, 0)), end(min(next + 2 + 2 * rows, p.h)) {}
  __device__ __forceinline__ bool has(int row) const { return begin <= row && row < end; }
};

// Where rows of x are made of aligned 16 bytes. Lane 16 i + j copies piece j of a pair's row i.
struct Pieces {
  Rows rows;
  int bytes;  // of the piece that there are; -1: no piece
  uint16_t* to;
  const uint16_t* from;

  __device__ __forceinline__ Pieces(const Args& args, uint16_t* ring, int64_t image, int column, Rows rows_)
      : rows(rows_) {
    const FusedMBConvParams& p = args.p;
    const int lane = static_cast<int>(threadIdx.x) % 32, piece = lane % 16 * 8;
    const int element = 3 * column - args.skew + piece;  // of the row, a multiple of 8
    bytes = piece >= args.skew + kRun ? -1 : element < 0 ? 0 : 2 * max(0, min(3 * p.w - element, 8));
    rows.next += lane / 16;
    to = ring + lane / 16 * kRow + piece;
    from = static_cast<const uint16_t*>(p.x) + image * p.x_stride[0] + rows.next * p.x_stride[1] + element;
  }

  // The first pairs, into the first slots of the ring.
  __device__ __forceinline__ void begin(const Args& args) {
#pragma unroll
    for (int i = 0; i < kRing - 1; ++i) start(args, i * kPair);
  }

  // Returns once this lane's part of all pairs but the youngest is there.
  __device__ __forceinline__ void arrive(int) { cp_async_wait<1>(); }

  // Starts the copy of a further pair into a slot that nobody reads any more.
  __device__ __forceinline__ void start(const Args& args, int slot) {
    if (bytes >= 0) cp_async_16(to + slot, from, rows.has(rows.next) ? bytes : 0);
    cp_async_commit();
    rows.next += 2;
    from = bytes_behind(from, args.x_pair);
  }
};

// At any strides. A lane has one column of x under the segment; the first six have a row and a channel of the
// last column, too.
struct Elements {
  static constexpr int kLast = 2 * kWide;
  Rows rows;
  const uint16_t *from, *last_from;
  uint16_t* to;
  bool mine, last_mine;
  uint16_t values[7];

  __device__ __forceinline__ Elements(const Args& args, uint16_t* ring, int64_t image, int column, Rows rows_)
      : rows(rows_) {
    const FusedMBConvParams& p = args.p;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint16_t* const x =
        static_cast<const uint16_t*>(p.x) + image * p.x_stride[0] + rows.next * p.x_stride[1];
    mine = 0 <= column + lane && column + lane < p.w;
    last_mine = lane < 6 && 0 <= column + kLast && column + kLast < p.w;
    from = x + (column + lane) * p.x_stride[2];
    last_from = x + lane / 3 * p.x_stride[1] + (column + kLast) * p.x_stride[2] + lane % 3 * p.x_stride[3];
    to = ring + args.skew + 3 * lane;
  }

  __device__ __forceinline__ void begin(const Args& args) {
    start(args, 0);
    arrive(0);
    start(args, 0);
  }

  // Puts the pair that is in registers into a slot of the ring.
  __device__ __forceinline__ void arrive(int slot) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 6; ++i) to[slot + i / 3 * kRow + i % 3] = values[i];
    if (lane < 6) to[slot + 3 * kLast - 3 * lane + lane / 3 * kRow + lane % 3] = values[6];
  }

  // Loads a further pair into registers.
  __device__ __forceinline__ void start(const Args& args, int) {
#pragma unroll
    for (int i = 0; i < 6; ++i)
      values[i] = mine && rows.has(rows.next + i / 3) ? *bytes_behind(from, args.x_steps[i]) : 0;
    values[6] = last_mine && rows.has(rows.next + static_cast<int>(threadIdx.x) % 32 / 3) ? *last_from : 0;
    rows.next += 2;
    from = bytes_behind(from, args.x_pair);
    last_from = bytes_behind(last_from, args.x_pair);
  }
};

// ---- output channels -------------------------------------------------------------------------------------

// How many blocks of 8 columns a lane stores at once.
template <int kBlocks>
__host__ __device__ constexpr int blocks_together(int block) {
  return block < kBlocks / 4 * 4 ? 4 : block < kBlocks / 2 * 2 ? 2 : 1;
}

// The output channel in a column of a block. Of blocks that are stored together lane t has columns 2t and 2t
// + 1, in all of them neighbouring channels.
template <int kBlocks>
__device__ __forceinline__ int channel_of(int block, int column) {
  const int together = blocks_together<kBlocks>(block), within = block % together;
  return 8 * (block - within) + column / 2 * (2 * together) + 2 * within + column % 2;
}

// Stores a lane's pairs of one pixel of y, from block kFirst on: of channels below `channels`.
template <bool kVector, int kBlocks, int kFirst = 0>
__device__ __forceinline__ void store_pixel(uint16_t* y, int channels, const uint32_t (&pairs)[kBlocks]) {
  if constexpr (kFirst < kBlocks) {
    constexpr int kTogether = blocks_together<kBlocks>(kFirst);
    const int channel = channel_of<kBlocks>(kFirst, static_cast<int>(threadIdx.x) % 4 * 2);
    if constexpr (kVector) {
      Vec<uint16_t, 2 * kTogether> out;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) out.words[i] = pairs[kFirst + i];
      if (channel < channels) out.store(y + channel);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kTogether; ++i)
        if (channel + i < channels)
          y[channel + i] = static_cast<uint16_t>(pairs[kFirst + i / 2] >> 16 * (i % 2));
    }
    store_pixel<kVector, kBlocks, kFirst + kTogether>(y, channels, pairs);
  }
}

// See keep.
__device__ __forceinline__ uint32_t kept(uint32_t x) {
  float bits = bit_cast<float>(x);
  keep(bits);
  return bit_cast<uint32_t>(bits);
}

// ---- kernel ----------------------------------------------------------------------------------------------

// As registers allow.
template <int kBlocks>
constexpr int kMinBlocks = kBlocks <= 4 ? 5 : 3;

template <class T, int kBlocks, class Loader>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocks<kBlocks>)
    stem_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const FusedMBConvParams& p = args.p;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  uint16_t* const ring = reinterpret_cast<uint16_t*>(shared_memory) + threadIdx.x / 32 * (kRing * kPair);
  // A row of a window begins with the first half of a word, or with the second one.
  const bool odd = args.skew % 2 != 0;

  // ---- weights and BatchNorm, in registers ----
  // Values 2t and 2t + 1, one further if odd, of the three rows, and the one left over of row t.
  uint32_t weight[kBlocks][2][2];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int channel = channel_of<kBlocks>(b, g);
    const uint16_t* const of_channel = static_cast<const uint16_t*>(p.weight) + channel * 27;
#pragma unroll
    for (int row = 0; row < 3; ++row) {
      const uint16_t* const pair = of_channel + 9 * row + 2 * t + (odd ? 1 : 0);
      weight[b][row / 2][row % 2] = channel < p.c_out ? pair[0] | uint32_t{pair[1]} << 16 : 0;
    }
    const uint32_t left_over = t < 3 && channel < p.c_out ? of_channel[9 * t + (odd ? 0 : 8)] : 0;
    weight[b][1][1] = odd ? left_over << 16 : left_over;
  }
  const uint32_t mask = kept(t == 3 ? 0 : odd ? 0xffff0000u : 0x0000ffffu);
  // Of channels in the order of the results.
  float scale[kBlocks][2], shift[kBlocks][2];
  const float factor = affine_factor(p.act == kSilu);
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) {
    const int channel = channel_of<kBlocks>(i / 2, 2 * t + i % 2);
    const Affine affine = channel < p.c_out ? bn_affine<T>(p.bn, channel) : Affine{0.0f, 0.0f};
    scale[i / 2][i % 2] = factor * affine.scale;
    shift[i / 2][i % 2] = factor * affine.shift;
  }

  // Where this lane reads: elements from the beginning of a row of the ring.
  const int pairs_at = args.skew / 2 * 2 + 6 * g + 2 * t + (odd ? 2 : 0);
  const int left_over_at = args.skew / 2 * 2 + 6 * g + (odd ? 0 : 8);
  const auto word = [](const uint16_t* at) { return Vec<uint16_t, 2>::load(at).words[0]; };

#pragma unroll 1
  for (unsigned number = blockIdx.x * kWarps + threadIdx.x / 32; number < args.places; number += args.warps) {
    const int segment = static_cast<int>(number % args.segments) * kWide;
    const int first_row = static_cast<int>(number / args.segments % args.bands) * args.rows;
    const int64_t image = number / args.segments / args.bands;
    const int rows = min(args.rows, p.oh - first_row);
    Loader loader(args, ring, image, 2 * segment - p.window.left, Rows(p, first_row, rows));
    cp_async_wait<0>();
    __syncwarp();  // nothing of the place before is under way or read any more
    loader.begin(args);

    // Of this lane's pixels, g and g + 8: where the first one is, and channels of y that there are.
    uint16_t* y = static_cast<uint16_t*>(p.y) +
                  ((image * p.oh + first_row) * p.ow + segment + g) * static_cast<int64_t>(p.c_out);
    const int channels[2] = {segment + g < p.ow ? p.c_out : 0, segment + g + 8 < p.ow ? p.c_out : 0};

    int before = 0, now = kPair, free_slot = (kRing - 1) * kPair;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      loader.arrive(now);
      __syncwarp();  // the pair is there for all lanes, and none reads the free slot any more
      loader.start(args, free_slot);

      const uint16_t* const first = ring + before + kRow + pairs_at;
      const uint16_t* const second = ring + now + pairs_at;
      const uint16_t* const left_over = ring + left_over_at +
                                        (t == 0   ? before + kRow
                                         : t == 1 ? now
                                                  : now + kRow);
      constexpr int kEight = 8 * 6;  // pixels
      const uint32_t a[4] = {word(first), word(first + kEight), word(second), word(second + kEight)};
      const uint32_t b[4] = {word(second + kRow), word(second + kRow + kEight), word(left_over) & mask,
                             word(left_over + kEight) & mask};
      float z[kBlocks][4] = {};
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) mma_m16n8k16<T>(z[i], a, weight[i][0]);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) mma_m16n8k16<T>(z[i], b, weight[i][1]);
      free_slot = before;
      before = now;
      now = now == (kRing - 1) * kPair ? 0 : now + kPair;

#pragma unroll
      for (int i = 0; i < kBlocks * 4; ++i)
        z[i / 4][i % 4] = fmaf(z[i / 4][i % 4], scale[i / 4][i % 2], shift[i / 4][i % 2]);
      if (p.act == kSilu) {
#pragma unroll
        for (int i = 0; i < kBlocks * 4; ++i) z[i / 4][i % 4] = silu_of_quarter(z[i / 4][i % 4]);
      } else {
        activate<false>(p.act, reinterpret_cast<float (&)[kBlocks * 4]>(z));
      }
      uint32_t pairs[2][kBlocks];
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i)
        pairs[i % 2][i / 2] = pack<T>(z[i / 2][i % 2 * 2], z[i / 2][i % 2 * 2 + 1]);
      uint16_t* const further = y + args.y_eight;
      if (args.vector_out) {
        store_pixel<true>(y, channels[0], pairs[0]);
        store_pixel<true>(further, channels[1], pairs[1]);
      } else {
        store_pixel<false>(y, channels[0], pairs[0]);
        store_pixel<false>(further, channels[1], pairs[1]);
      }
      y += args.y_row;
    }
  }
}

// ---- launcher --------------------------------------------------------------------------------------------

// Whether all rows of x begin with aligned 16 bytes and are NHWC.
bool rows_are_pieces(const FusedMBConvParams& p) {
  return p.x_stride[3] == 1 && (p.x_stride[2] == 3 || p.w == 1) && is_aligned(p.x, 16) &&
         p.x_stride[1] % 8 == 0 && (p.x_stride[0] % 8 == 0 || p.n == 1);  // of rows that are not there, too
}

template <class T, int kBlocks, class Loader>
Status launch_typed(const FusedMBConvParams& p, cudaStream_t stream) {
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return {error, nullptr};
  Args args = {};
  args.p = p;
  args.vector_out = p.c_out % 8 == 0 && is_aligned(p.y, 16);
  args.skew = static_cast<int>((8 - 3 * int64_t{p.window.left} % 8) % 8);
  args.segments = ceil_div(p.ow, kWide);
  for (int i = 0; i < 6; ++i) args.x_steps[i] = 2 * (i / 3 * p.x_stride[1] + i % 3 * p.x_stride[3]);
  args.x_pair = 4 * p.x_stride[1];
  args.y_row = static_cast<int64_t>(p.ow) * p.c_out;
  args.y_eight = int64_t{8} * p.c_out;
  // How many places a warp has: long ones read fewer rows twice, with short ones all warps have as much to
  // do. What they take is counted in output rows, the beginning of a place as two.
  const int64_t round = int64_t{multiprocessors} * kMinBlocks<kBlocks> * kWarps;
  const int64_t columns = p.n * args.segments, fewest = ceil_div(columns, round);
  int64_t least = INT64_MAX;
  for (int64_t turns = fewest; turns < fewest + 8; ++turns) {
    const int64_t rows = ceil_div<int64_t>(p.oh, std::min<int64_t>(turns * round / columns, p.oh));
    if (turns * (rows + 2) >= least) continue;
    least = turns * (rows + 2);
    args.rows = static_cast<int>(rows);
  }
  args.bands = ceil_div(p.oh, args.rows);
  const int64_t places = columns * args.bands;
  if (places > INT32_MAX) return {cudaErrorInvalidValue, "the map has too many elements for one launch"};
  const int64_t blocks = ceil_div<int64_t>(std::min(places, round), kWarps);
  args.places = static_cast<unsigned>(places);
  args.warps = static_cast<unsigned>(blocks * kWarps);
  return launch<stem_kernel<T, kBlocks, Loader>>(blocks, kWarps * 32, kSharedBytes, stream, args);
}

}  // namespace

bool stem_serves(const FusedMBConvParams& p) {
  const Window& window = p.window;
  const int64_t longest =
      std::max({p.h, p.w, p.oh, p.ow, window.top, window.left});  // 32 bits hold a row's elements
  return p.dtype != DType::kFloat32 && p.c_in == 3 && p.project == nullptr && !p.residual && p.c_out <= 64 &&
         window.kh == 3 && window.kw == 3 && window.stride_h == 2 && window.stride_w == 2 &&
         longest < 1 << 28;
}

Status launch_stem(const FusedMBConvParams& p, cudaStream_t stream) {
  if (p.n * p.oh * p.ow == 0 || p.c_out == 0) return {};
  return with_type<half, bf16>(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto with_blocks = [&](auto blocks) {
      constexpr int kBlocks = decltype(blocks)::value;
      return rows_are_pieces(p) ? launch_typed<T, kBlocks, Pieces>(p, stream)
                                : launch_typed<T, kBlocks, Elements>(p, stream);
    };
    if (p.c_out <= 24) return with_blocks(std::integral_constant<int, 3>());
    if (p.c_out <= 32) return with_blocks(std::integral_constant<int, 4>());
    if (p.c_out <= 48) return with_blocks(std::integral_constant<int, 6>());
    return with_blocks(std::integral_constant<int, 8>());
  });
}

}  // namespace effnet::cuda
