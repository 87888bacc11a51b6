// Kept calls of the ops: what torch.ops.effnet_kernels_cpu.keep_*, replay and forget do.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "bindings_cpu.h"

namespace effnet {

// Calls kept with all their arguments but x and out. Torch takes 20 to 50 us to bring 25 tensors from Python
// here; a kept call brings two. The tensors are read and checked at every replay like at every call.
class Kept {
 public:
  using Call = std::function<void(const Tensor& out, const Tensor& x)>;

  // A fork waits until no other thread is in here: the child would find the lock taken, for good.
  Kept();

  int64_t add(Call call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    calls_[++last_] = std::make_shared<const Call>(std::move(call));
    return last_;
  }
  std::shared_ptr<const Call> get(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = calls_.find(number);
    STD_TORCH_CHECK(found != calls_.end(), "call must be the number of a kept call, got ", number);
    return found->second;
  }
  void remove(int64_t number) {
    const auto call = get(number);  // its tensors are released outside the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    calls_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Call>> calls_;
  int64_t last_ = 0;
};

// Made as the library is loaded, and never destroyed: torch may be gone by then.
inline Kept* const kept_calls = new Kept;
inline Kept& kept() { return *kept_calls; }

inline Kept::Kept() {
  const auto unlock = [] { kept().mutex_.unlock(); };
  pthread_atfork([] { kept().mutex_.lock(); }, unlock, unlock);
}

template <auto kOp>
struct Keep;

template <class... Rest, void (*kOp)(Tensor, Tensors, Tensor, Rest...)>
struct Keep<kOp> {
  static int64_t keep(Tensors packed, Rest... rest) {
    return kept().add(
        [packed, rest...](const Tensor& out, const Tensor& x) { kOp(out, packed, x, rest...); });
  }
};

inline void replay(int64_t number, Tensor out, Tensor x) { (*kept().get(number))(out, x); }

// Several kept calls, each of which takes what the one before gave, as one. Maps in between are dense [N, H,
// W, C] in x's dtype and live in two buffers that take turns: what one call has just read, the next but one
// writes.
class Joined {
 public:
  // sizes: N, C, H, W of every map in between.
  Joined(const std::vector<int64_t>& calls, const std::vector<int64_t>& sizes) {
    STD_TORCH_CHECK(!calls.empty() && sizes.size() == 4 * (calls.size() - 1),
                    "sizes must have 4 numbers for each map between ", calls.size(), " calls, got ",
                    sizes.size());
    for (const int64_t number : calls) calls_.push_back(kept().get(number));
    for (size_t i = 0; i < calls.size() - 1; ++i) {
      const int64_t *map = &sizes[4 * i], n = map[0], c = map[1], h = map[2], w = map[3];
      maps_.push_back({n, c, h, w});
      elements_[i % 2] = std::max(elements_[i % 2], n * c * h * w);
    }
  }

  void operator()(const Tensor& out, const Tensor& x) const {
    const ScalarType type = x.scalar_type();
    const Tensor buffers[] = {torch::stable::new_empty(x, {elements_[0]}),
                              torch::stable::new_empty(x, {elements_[1]})};
    Tensor from = x;
    for (size_t i = 0; i < maps_.size(); ++i) {
      const auto& [n, c, h, w] = maps_[i];
      const Tensor to = torch::stable::from_blob(buffers[i % 2].data_ptr(), {n, c, h, w},
                                                 {h * w * c, 1, w * c, c}, x.device(), type);
      (*calls_[i])(to, from);
      from = to;
    }
    (*calls_.back())(out, from);
  }

 private:
  std::vector<std::shared_ptr<const Kept::Call>> calls_;
  std::vector<std::array<int64_t, 4>> maps_;
  int64_t elements_[2] = {0, 0};
};

inline int64_t join(std::vector<int64_t> calls, std::vector<int64_t> sizes) {
  return kept().add(Joined(calls, sizes));
}

inline void forget(int64_t number) { kept().remove(number); }

}  // namespace effnet
