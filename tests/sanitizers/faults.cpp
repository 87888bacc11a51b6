// One planted fault per function: what `make sanitize` has to report. Compiled into the sanitized library.
#include <climits>
#include <cstdint>

#include "cpu/common.h"

namespace {

float at(const float* p, int64_t i) { return p[i]; }
volatile int64_t beyond = 24;

}  // namespace

extern "C" {

#define FAULT __attribute__((visibility("default"), noinline))

FAULT float read_behind_scratch() {
  effnet::Scratch scratch;
  const float* taken = scratch.take(24);
  scratch.take(24);
  return at(taken, beyond);
}

FAULT float read_released_scratch() {
  effnet::Scratch outer;
  outer.take(1);
  const float* released;
  {
    effnet::Scratch scratch;
    released = scratch.take(24);
  }
  return at(released, 0);
}

// Not reported, but NaN: the tests of numbers see it.
FAULT float read_unwritten_scratch() {
  effnet::Scratch scratch;
  return at(scratch.take(24), beyond - 1);
}

FAULT float misaligned() {
  const float pair[2] = {1, 2};
  return at(reinterpret_cast<const float*>(reinterpret_cast<const char*>(pair) + 1), 0);
}

FAULT int shift_too_far() { return 1 << (beyond + 8); }

FAULT int signed_overflow() { return INT_MAX - 24 + static_cast<int>(beyond + 1); }

FAULT int nan_to_int() { return static_cast<int>(__builtin_nanf("") * beyond); }

FAULT int index_outside_of_an_array() {
  int values[4] = {1, 2, 3, 4};
  return values[beyond - 20];
}
}
