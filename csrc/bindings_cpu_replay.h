// Kept calls of the ops: what torch.ops.effnet_kernels_cpu.keep_*, replay and forget do.
#pragma once

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

  int64_t add(Call call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    calls_[++last_] = std::make_shared<const Call>(std::move(call));
    return last_;
  }
  std::shared_ptr<const Call> find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = calls_.find(number);
    return found == calls_.end() ? nullptr : found->second;
  }
  void remove(int64_t number) {
    const auto kept = find(number);  // its tensors are released outside the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    calls_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Call>> calls_;
  int64_t last_ = 0;
};

inline Kept& kept() {
  static Kept* const calls = new Kept;  // never destroyed: torch may be gone by then
  return *calls;
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

inline void replay(int64_t number, Tensor out, Tensor x) {
  const auto call = kept().find(number);
  STD_TORCH_CHECK(call != nullptr, "call must be the number of a kept call, got ", number);
  (*call)(out, x);
}

inline void forget(int64_t number) { kept().remove(number); }

}  // namespace effnet
