// Calls of the ops: made at once, or recorded and repeated.
//
// A call has two parts. Its constants (packed weights, folded norms, the matrices of squeeze-and-excitation)
// are made from the caller's tensors, in the order that the kernels read; kernels see no weight in another
// form. With the constants the parameters are complete except for the maps. A recorded call is one tensor for
// each part, and neither is written to again. A program is a list of recorded calls; each takes the map that
// the one before it gives.
#pragma once

#include <array>
#include <cstring>
#include <new>
#include <tuple>
#include <variant>

#include "bindings_cpu.h"
#include "cpu/instruction_sets.h"

namespace effnet {

// The constants of a call, one after the other, in scratch memory or at `memory`. With `make` they are made
// there; without, they are there already, or, where there is no memory, only counted.
class Constants {
 public:
  Constants(const Kernels& kernels, const Pool& pool, Scratch& scratch)
      : kernels_(kernels), pool_(pool), scratch_(&scratch), make_(true) {}
  Constants(const Kernels& kernels, const Pool& pool, float* memory, bool make)
      : kernels_(kernels), pool_(pool), memory_(memory), make_(make) {}

  int64_t floats() const { return used_; }

  Weight weight(const char* name, const Tensor& t, const Tensor4& x, const int64_t (&wanted)[4]) {
    check_sizes(name, t, wanted);
    const Tensor4 source = tensor4(name, t);
    STD_TORCH_CHECK(source.type == x.type, name, " must have the dtype of x");
    float* packed = take(kernels_.packed_floats(source));
    if (make_ && !empty(source)) kernels_.pack(source, packed, pool_);
    return {packed, source.type, {wanted[0], wanted[1], wanted[2], wanted[3]}};
  }

  // A weight that has been through weight(), for Winograd's algorithm; or null where that is not for it.
  const float* winograd(const Tensor& t, const Window& window) {
    const Tensor4 source = tensor4("weight", t);
    const int64_t floats = kernels_.winograd_floats(source, window);
    if (floats == 0) return nullptr;
    float* packed = take(floats);
    if (make_) kernels_.pack_winograd(source, packed, pool_);
    return packed;
  }

  Affine batch_norm(const char* name, const Tensors& bn, double eps, int64_t channels) {
    check_batch_norm(name, bn);
    const BatchNorm norm{vector(name, bn[0], channels), vector(name, bn[1], channels),
                         vector(name, bn[2], channels), vector(name, bn[3], channels),
                         static_cast<float>(eps)};
    const int64_t floats = kernels_.folded_floats(channels);
    float* folded = take(floats);
    if (make_) kernels_.fold(norm, channels, folded);
    return {folded, folded + floats / 2};
  }

  SqueezeExciteWeights squeeze_excite(const Tensors& se, const std::string& act, const std::string& gate,
                                      int64_t channels) {
    const int64_t reduced = check_squeeze_excite(se);
    SqueezeExciteWeights out;
    out.channels = channels;
    out.reduced = reduced;
    out.w_reduce = matrix("se.w_reduce", se[0], reduced, channels);
    out.b_reduce = copy(vector("se.b_reduce", se[1], reduced), reduced);
    out.w_expand = matrix("se.w_expand", se[2], channels, reduced);
    out.b_expand = copy(vector("se.b_expand", se[3], channels), channels);
    out.act = act_code("se_act", act);
    out.gate = act_code("se_gate", gate);
    return out;
  }

 private:
  float* take(int64_t floats) {
    constexpr int64_t kCacheLine = 16;  // floats
    floats = (floats + kCacheLine - 1) / kCacheLine * kCacheLine;
    if (scratch_ != nullptr) return scratch_->take(floats);
    used_ += floats;
    return memory_ == nullptr ? nullptr : memory_ + used_ - floats;
  }

  Matrix matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
    check_sizes(name, t, {rows, cols, 1, 1});
    const Tensor4 w = tensor4(name, t);
    return dense(w.type, w.data, w.stride[0], w.stride[1], rows, cols);
  }

  Matrix copy(const Vector& v, int64_t n) { return dense(v.type, v.data, 0, v.stride, 1, n); }

  Matrix dense(DType type, const void* data, int64_t row, int64_t col, int64_t rows, int64_t cols) {
    float* to = take(rows * cols);
    if (type == DType::kFloat32) {
      copy_dense(static_cast<const float*>(data), row, col, rows, cols, to);
    } else {  // the values do not matter
      copy_dense(static_cast<const uint16_t*>(data), row, col, rows, cols, reinterpret_cast<uint16_t*>(to));
    }
    return {to, type};
  }

  template <class T>
  void copy_dense(const T* data, int64_t row, int64_t col, int64_t rows, int64_t cols, T* to) {
    for (int64_t r = 0; make_ && r < rows; ++r) {
      const T* from = data + r * row;
      if (col == 1) {
        std::memcpy(to + r * cols, from, cols * sizeof(T));
      } else {
        for (int64_t c = 0; c < cols; ++c) to[r * cols + c] = from[c * col];
      }
    }
  }

  const Kernels& kernels_;
  const Pool& pool_;
  Scratch* scratch_ = nullptr;
  float* memory_ = nullptr;
  bool make_;
  int64_t used_ = 0;
};

inline void run(const Kernels& k, const PointwiseParams& p, const Pool& pool) {
  k.pointwise_conv_bn_act(p, pool);
}
inline void run(const Kernels& k, const DepthwiseParams& p, const Pool& pool) {
  k.depthwise_conv_bn_act(p, pool);
}
inline void run(const Kernels& k, const SqueezeExciteParams& p, const Pool& pool) {
  k.squeeze_excite(p, pool);
}
inline void run(const Kernels& k, const FusedMBConvParams& p, const Pool& pool) { k.fused_mbconv(p, pool); }
inline void run(const Kernels& k, const MBConvParams& p, const Pool& pool) { k.mbconv(p, pool); }

// A call with its parameters, for any maps of the same form. Several of them one after the other are a
// program.
struct RecordedCall {
  uint64_t mark = kMark;
  const Kernels* kernels;
  std::variant<PointwiseParams, DepthwiseParams, SqueezeExciteParams, FusedMBConvParams, MBConvParams> params;

  static constexpr uint64_t kMark = 0x6b657074'63616c6c;
};
static_assert(std::is_trivially_copyable_v<RecordedCall> && sizeof(RecordedCall) % sizeof(int64_t) == 0);

// The calls of one op: kMake(constants, out, ...) gives their parameters.
template <auto kMake>
struct OpCalls;

template <class Params, class... Args, Params (*kMake)(Constants&, Tensor, Args...)>
struct OpCalls<kMake> {
  static void call(Tensor out, Args... args) {
    const Kernels& k = kernels();
    const SharedPool pool;
    Scratch scratch;
    Constants constants(k, pool, scratch);
    const Params p = kMake(constants, out, args...);
    if (!empty(p.y)) run(k, p, pool);
  }

  static Tensor pack(Tensor out, Args... args) {
    const Kernels& k = kernels();
    const SharedPool pool;
    Constants counted(k, pool, nullptr, false);
    kMake(counted, out, args...);
    const Tensor memory = torch::stable::new_empty(out, {counted.floats()}, ScalarType::Float);
    Constants constants(k, pool, static_cast<float*>(memory.data_ptr()), true);
    kMake(constants, out, args...);
    return memory;
  }

  static Tensor keep(Tensor packed, Tensor out, Args... args) {
    const Kernels& k = kernels();
    STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.scalar_type() == ScalarType::Float,
                    "packed must be contiguous float32");
    Constants constants(k, Pool(), static_cast<float*>(packed.data_ptr()), false);
    Params p = kMake(constants, out, args...);
    STD_TORCH_CHECK(packed.dim() == 1 && packed.size(0) == constants.floats(),
                    "packed must be of a call like this one");
    if constexpr (std::is_same_v<Params, PointwiseParams>) {
      p.residual_is_x = p.residual.data != nullptr && p.residual.data == p.x.data;
      STD_TORCH_CHECK(p.gate == nullptr && p.residual_is_x == (p.residual.data != nullptr),
                      "a call with a gate, or a residual that is not x, cannot be kept");
    }
    if constexpr (std::is_same_v<Params, DepthwiseParams>) p.mean = nullptr;
    const Tensor kept =
        torch::stable::new_empty(out, {int64_t{sizeof(RecordedCall) / sizeof(int64_t)}}, ScalarType::Long);
    new (kept.data_ptr()) RecordedCall{RecordedCall::kMark, &k, p};
    return kept;
  }
};

inline bool same_form(const Tensor4& a, const Tensor4& b) {
  return a.type == b.type && std::equal(a.size, a.size + 4, b.size) &&
         std::equal(a.stride, a.stride + 4, b.stride);
}

inline Tensor4 output(const Tensor& t) {  // a map, or [N, C] as the kernels that pool have it
  if (t.dim() != 2) return tensor4("out", t);
  return {memory("out", t), dtype_of("out", t), {t.size(0), t.size(1), 1, 1}, {t.size(1), 1, 1, 1}};
}

// ---- sources ---------------------------------------------------------------------------------------------

// A table says what the memory of tensors was at one moment: Chunks, as numbers. Tables one behind the other
// are a table of all.
constexpr int64_t kChunkBytes = 16384;

inline int64_t item_bytes(ScalarType type) {
  const bool is_16 = type == ScalarType::BFloat16 || type == ScalarType::Half;
  STD_TORCH_CHECK(is_16 || type == ScalarType::Float || type == ScalarType::Double,
                  "sources must be floating-point tensors");
  return is_16 ? 2 : type == ScalarType::Float ? 4 : 8;
}

inline Tensor digest(Tensors sources) {
  const Kernels& k = kernels();
  std::vector<Chunk> chunks;
  for (const Tensor& t : sources) {
    STD_TORCH_CHECK(t.is_cpu(), "sources must be on the CPU");
    uint64_t extent = 1;  // elements from the first to the last
    for (int i = 0; i < t.dim(); ++i)
      extent = t.size(i) == 0 || extent == 0 ? 0 : extent + (t.size(i) - 1) * t.stride(i);
    const uint64_t begin = reinterpret_cast<uint64_t>(memory("a source", t)),
                   end = begin + extent * item_bytes(t.scalar_type());
    for (uint64_t at = begin; at < end; at += kChunkBytes)
      chunks.push_back({at, std::min<uint64_t>(kChunkBytes, end - at), 0});
  }
  STD_TORCH_CHECK(!sources.empty(), "there must be sources");
  for (Chunk& c : chunks) c.digest = k.digest(reinterpret_cast<const void*>(c.address), c.bytes);
  const Tensor table =
      torch::stable::new_empty(sources[0], {static_cast<int64_t>(chunks.size()), 3}, ScalarType::Long);
  std::copy(chunks.begin(), chunks.end(), static_cast<Chunk*>(table.data_ptr()));
  return table;
}

inline void watch(const Tensor& table, Watch& watch) {
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                      table.size(1) == 3 && table.is_contiguous(),
                  "table must be of digest");
  watch.chunks = static_cast<const Chunk*>(table.data_ptr());
  watch.count = table.size(0);
}

// Whether the memory is what it was when the table was made.
inline bool unchanged(Tensor table) {
  Watch memory;
  watch(table, memory);
  SharedPool pool;
  pool.watch = &memory;
  kernels().finish(pool);
  return memory.same.load();
}

// ---- programs --------------------------------------------------------------------------------------------

// Repeats the recorded calls one after the other, from x to out. Returns false, with out undefined, if
// another instruction set is in use or if the memory is not what the table says, which is compared meanwhile.
// The maps between two calls are dense [N, H, W, C] and lie in two buffers in turn.
inline bool replay(Tensor program, Tensor table, Tensor out, Tensor x) {
  const Kernels& k = kernels();
  const int64_t bytes = program.numel() * int64_t{sizeof(int64_t)},
                count = bytes / int64_t{sizeof(RecordedCall)};
  STD_TORCH_CHECK(program.is_cpu() && program.scalar_type() == ScalarType::Long && program.is_contiguous() &&
                      count > 0 && bytes % int64_t{sizeof(RecordedCall)} == 0,
                  "program must be of keep_*");
  const auto* const calls = static_cast<const RecordedCall*>(program.data_ptr());
  Watch memory;
  watch(table, memory);
  SharedPool pool;
  pool.watch = &memory;
  Tensor4 from = tensor4("x", x);
  const Tensor4 to = output(out);
  int64_t elements[2] = {0, 0};
  const Tensor4* before = &from;
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(calls[i].mark == RecordedCall::kMark, "program must be of keep_*");
    if (calls[i].kernels != &k) return false;
    std::visit(
        [&](const auto& p) {
          STD_TORCH_CHECK(same_form(p.x, *before),
                          "calls must each take what the one before gives, and the first x");
          before = &p.y;
          int64_t& most = elements[i % 2];
          if (i + 1 < count) most = std::max(most, p.y.size[0] * p.y.size[1] * p.y.size[2] * p.y.size[3]);
        },
        calls[i].params);
  }
  STD_TORCH_CHECK(same_form(to, *before), "out must be what the last of the calls gives");
  const Tensor buffers[] = {torch::stable::new_empty(x, {elements[0]}),
                            torch::stable::new_empty(x, {elements[1]})};
  for (int64_t i = 0; i < count && memory.same.load(); ++i) {
    void* const data = i + 1 < count ? buffers[i % 2].data_ptr() : to.data;
    std::visit(
        [&](auto p) {  // a copy, with maps
          p.x.data = from.data;
          p.y.data = data;
          if constexpr (std::is_same_v<decltype(p), PointwiseParams>)
            if (p.residual_is_x) p.residual.data = from.data;
          if (!empty(p.y)) run(k, p, pool);
          from = p.y;
        },
        calls[i].params);
  }
  if (memory.next.load() < memory.count) k.finish(pool);
  return memory.same.load();
}

}  // namespace effnet
