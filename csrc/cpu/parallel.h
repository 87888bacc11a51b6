// Loops over threads.
#pragma once

#include "digest.h"

namespace effnet {
namespace EFFNET_ISA {

// Runs body(i) for i in [0, n) on the pool, handing out indices one by one: which thread runs which
// index varies, what is computed for an index does not.
template <class Body>
static inline void parallel(const Pool& pool, int64_t n, const Body& body) {
  if (pool.threads <= 1 || n <= 1) {
    Watcher watcher(pool.watch);
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  struct Shared {
    const Body& body;
    std::atomic<int64_t> next;
    int64_t n;
    Watch* watch;
  } shared{body, {0}, n, pool.watch};
  pool.run(
      min64(n, pool.threads),
      [](void* context, int64_t) {
        auto& s = *static_cast<Shared*>(context);
        Watcher watcher(s.watch);
        for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.n;) s.body(i);
      },
      &shared);
}

// One image a thread while whole rounds of images last, then all threads on each image that is left.
// body(image, pool) must give the same bits for every pool.
template <class Body>
static inline void parallel_images(const Pool& pool, int64_t n, const Body& body) {
  const int64_t rounds = n / pool.threads * pool.threads;
  const Pool alone;
  if (rounds > 0) parallel(pool, rounds, [&](int64_t image) { body(image, alone); });
  for (int64_t image = rounds; image < n; ++image) body(image, pool);
}

// Digests what is left of a watch when everything is computed.
[[maybe_unused]] static void finish(const Pool& pool) {
  parallel(pool, pool.threads, [&](int64_t) { Watcher(pool.watch).finish(); });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
