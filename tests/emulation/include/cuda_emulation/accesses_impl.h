// Included by emulation.cpp.
#pragma once

#include <dlfcn.h>

#include <array>
#include <bitset>
#include <cinttypes>
#include <cstdio>
#include <set>
#include <unordered_map>

#include "accesses.h"
#include "scheduler.h"

// Made by the linker: where this library begins and ends.
CUDA_EMULATION_HIDDEN const unsigned char __ehdr_start[], _end[];

namespace cuda_emulation {

Accesses accesses;

// ---- races in shared memory ----------------------------------------------------------------------------

// One cell for every four bytes, and two more for what touches less than four. A single byte counts as two.
struct Accesses::Shadow {
  static constexpr std::size_t kWords = 2 * kMaxSharedMemory / 4;
  Cell words[kWords];
  Cell halves[2 * kWords];
  std::unordered_map<const Cell*, std::array<std::uint32_t, 32>> read_times;
  std::uint32_t half_epoch[kWords] = {};  // when a half was last touched
  std::uint32_t copied_to[kWords] = {};   // the block in which a cp.async is under way to it
};

void Accesses::open(const void* kernel, const void* arguments, std::size_t argument_bytes) {
  if (!shadow_) shadow_ = std::make_shared<Shadow>();
  std::tie(shared_begin_, shared_end_) = block_memory.all();
  if (static_cast<std::size_t>(shared_end_ - shared_begin_) > 4 * Shadow::kWords)
    throw Error("the kernels have more static shared memory than the emulation watches");
  owner_ = pthread_self();
  kernel_ = relative(kernel);
  arguments_ = {reinterpret_cast<std::uintptr_t>(arguments),
                reinterpret_cast<std::uintptr_t>(arguments) + argument_bytes};
  counted_ = false;
}

void Accesses::begin_block() {
  ++epoch_;
  ++block_;
}

void Accesses::visit(const unsigned char* pointer, std::size_t bytes, bool write, const void* pc) {
  if (bytes == 0) return;
  if (pointer >= shared_begin_ && pointer < shared_end_) {
    visit_shared(pointer - shared_begin_, bytes, write, relative(pc));
    if (counting_) note(pointer - shared_begin_, bytes, true, relative(pc));
  } else if (counting_) {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    const bool private_memory = scheduler.on_a_stack(pointer) ||
                                (pointer >= __ehdr_start && pointer < _end) ||
                                (address >= arguments_.first && address < arguments_.second);
    if (!private_memory) note(address, bytes, false, relative(pc));
  }
}

void Accesses::visit_shared(std::size_t offset, std::size_t bytes, bool write, std::uint32_t pc) {
  Shadow& shadow = *shadow_;
  if (!block_memory.contains(shared_begin_ + offset, bytes))
    scheduler.fail("accesses shared memory at @0x%" PRIx32 " beyond the %zu bytes that the launch asked for",
                   pc, block_memory.dynamic_bytes());
  for (std::size_t word = offset / 4; 4 * word < offset + bytes; ++word) {
    Cell& whole = shadow.words[word];
    check_copy(word, pc);
    check(whole, write, pc);
    if (4 * word >= offset && 4 * word + 4 <= offset + bytes) {
      if (shadow.half_epoch[word] == epoch_) {
        check(shadow.halves[2 * word], write, pc);
        check(shadow.halves[2 * word + 1], write, pc);
      }
      record(whole, write, pc);
      continue;
    }
    shadow.half_epoch[word] = epoch_;
    for (std::size_t half = 2 * word; half < 2 * word + 2; ++half) {
      if (2 * half + 2 <= offset || 2 * half >= offset + bytes) continue;
      check(shadow.halves[half], write, pc);
      record(shadow.halves[half], write, pc);
    }
  }
}

// Vector clocks: who meets knows of all what any of them knew.
void Accesses::warp_barrier(int warp, unsigned lanes) {
  const std::uint32_t time = times_of_warps_[warp] = ++time_;
  std::uint32_t joined[32] = {};
  for (int b = 0; b < 32; ++b) {
    for (int a = 0; a < 32; ++a)
      if (lanes >> a & 1) joined[b] = std::max(joined[b], known_[warp][a][b]);
    if (lanes >> b & 1) joined[b] = time;
  }
  for (int a = 0; a < 32; ++a)
    if (lanes >> a & 1) std::copy(joined, joined + 32, known_[warp][a]);
}

void Accesses::barrier_of_warps(unsigned warps) {
  std::uint32_t joined[32] = {};
  for (int warp = 0; warp < 32; ++warp) {
    if (!(warps >> warp & 1)) continue;
    warp_barrier(warp, 0xffffffff);
    for (int other = 0; other < 32; ++other)
      joined[other] = std::max(joined[other], known_warps_[warp][other]);
  }
  for (int warp = 0; warp < 32; ++warp)
    if (warps >> warp & 1) joined[warp] = times_of_warps_[warp];
  for (int warp = 0; warp < 32; ++warp)
    if (warps >> warp & 1) std::copy(joined, joined + 32, known_warps_[warp]);
}

std::uint32_t* Accesses::read_times(const Cell& cell) { return shadow_->read_times[&cell].data(); }

void Accesses::check(const Cell& cell, bool write, std::uint32_t pc) {
  const int warp = thread_ / 32, writers = cell.writer / 32;
  if (cell.write_epoch == epoch_ && cell.writer != thread_ &&
      !(writers == warp ? ordered(cell.writer % 32, cell.write_time)
                        : warp_ordered(writers, cell.write_time)))
    race(write, pc, cell.writer, "", true, cell.write_pc);
  if (!write || cell.read_epoch != epoch_) return;
  for (std::uint32_t rest = cell.readers; rest != 0; rest &= rest - 1) {
    const int reader = __builtin_ctz(rest);
    if (cell.several) {
      if (!warp_ordered(reader, read_times(cell)[reader]))
        race(write, pc, -1, "threads of several warps", false, cell.read_pc);
    } else if (cell.read_warp != warp ? !warp_ordered(cell.read_warp, cell.read_time)
                                      : reader != thread_ % 32 && !ordered(reader, cell.read_time)) {
      race(write, pc, 32 * cell.read_warp + reader, "", false, cell.read_pc);
    }
  }
}

void Accesses::record(Cell& cell, bool write, std::uint32_t pc) {
  const int warp = thread_ / 32;
  const std::uint32_t lane = 1u << thread_ % 32, time = times_of_warps_[warp];
  if (write) {
    cell.write_epoch = epoch_, cell.write_time = time, cell.write_pc = pc;
    cell.writer = static_cast<std::uint16_t>(thread_);
    return;
  }
  if (cell.read_epoch != epoch_) {
    cell.readers = 0;
    cell.several = false;
  } else if (cell.several || cell.read_warp != warp) {
    // Who has read, forgetting the warps that this one has behind it: whoever comes after it comes after
    // them.
    std::uint32_t* const times = read_times(cell);
    if (!cell.several) times[cell.read_warp] = cell.read_time;
    std::uint32_t warps = cell.several ? cell.readers : 1u << cell.read_warp;
    for (std::uint32_t rest = warps; rest != 0; rest &= rest - 1)
      if (warp_ordered(__builtin_ctz(rest), times[__builtin_ctz(rest)])) warps &= ~(rest & -rest);
    times[warp] = time;
    cell.several = warps != 0;
    cell.readers = cell.several ? warps | 1u << warp : 0;
    if (cell.several) return;
  } else if (cell.read_time != time) {
    for (std::uint32_t rest = cell.readers; rest != 0; rest &= rest - 1)
      if (ordered(__builtin_ctz(rest), cell.read_time)) cell.readers &= ~(rest & -rest);
  }
  cell.read_warp = static_cast<std::uint8_t>(warp);
  cell.read_epoch = epoch_, cell.read_time = time, cell.read_pc = pc;
  cell.readers |= lane;
}

void Accesses::start_copy(const void* shared, const void* global, int valid_bytes, const void* pc) {
  access(shared, 16, true, pc);
  if (valid_bytes > 0) access(global, static_cast<std::size_t>(valid_bytes), false, pc);
  const std::size_t first = (static_cast<const unsigned char*>(shared) - shared_begin_) / 4;
  for (std::size_t word = first; word < first + 4; ++word) shadow_->copied_to[word] = block_;
}

// It writes now, at the wait: other threads need a barrier after that.
void Accesses::finish_copy(const void* shared, const void* pc) {
  const std::size_t first = (static_cast<const unsigned char*>(shared) - shared_begin_) / 4;
  for (std::size_t word = first; word < first + 4; ++word) {
    shadow_->copied_to[word] = 0;
    record(shadow_->words[word], true, relative(pc));
  }
}

void Accesses::check_copy(std::size_t word, std::uint32_t pc) {
  if (shadow_->copied_to[word] == block_)
    scheduler.fail("accesses shared memory at @0x%" PRIx32 " to which a cp.async is under way", pc);
}

void Accesses::race(bool write, std::uint32_t pc, int other, const char* others, bool wrote,
                    std::uint32_t other_pc) {
  const std::string who = other >= 0 ? scheduler.thread_name(other) : others;
  scheduler.fail("%s shared memory at @0x%" PRIx32 " that %s %s at @0x%" PRIx32
                 ", without a barrier in between",
                 write ? "writes" : "reads", pc, who.c_str(), wrote ? "wrote" : "read", other_pc);
}

void Accesses::copied(const void* to, const void* from, std::size_t bytes) {
  if (from != nullptr) access(from, bytes, false, __builtin_return_address(0));
  access(to, bytes, true, __builtin_return_address(0));
}

void Accesses::misaligned(const void* pointer, std::size_t bytes) {
  if (inside()) scheduler.fail("accesses %p, which is not aligned to %zu bytes", pointer, bytes);
}

// ---- costs ---------------------------------------------------------------------------------------------

void Accesses::count(bool counting) {
  counting_ = counting;
  costs_.clear();
}

// The lanes of a warp make the same request when they are at the same address for the same time.
void Accesses::note(std::uintptr_t pointer, std::size_t bytes, bool shared, std::uint32_t pc) {
  if (counted_) return;
  const std::uint32_t time = times_[std::uint64_t{static_cast<unsigned>(thread_)} << 32 | pc]++;
  // What is no whole vector goes word by word.
  const std::size_t piece = bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16 ? bytes : 4;
  for (std::size_t i = 0; i < bytes; i += piece) {
    const std::uint64_t warp = static_cast<std::uint64_t>(thread_ / 32) << 8 | i / piece;
    Request& request = requests_[{warp << 32 | pc, time}];
    request.addresses[thread_ % 32] = pointer + i;
    request.lanes |= 1u << thread_ % 32;
    request.bytes = static_cast<std::uint8_t>(piece);
    request.shared = shared;
  }
}

void Accesses::end_block() {
  thread_ = -1;
  if (!counting_ || counted_) return;
  counted_ = true;
  for (const auto& [key, request] : requests_) {
    const auto pc = static_cast<std::uint32_t>(key.first);
    Cost& cost = costs_[{kernel_, {pc, request.shared}}];
    cost.shared = request.shared;
    ++cost.requests;
    if (request.shared) {
      // A wavefront serves as many lanes as fill the banks; lanes that want the same word share it.
      const int at_once = request.bytes <= 4 ? 32 : 128 / request.bytes;
      for (int first = 0; first < 32; first += at_once) {
        std::set<std::uintptr_t> of_bank[32];
        std::size_t most = 0, words = 0;
        for (int lane = first; lane < first + at_once; ++lane) {
          if (!(request.lanes >> lane & 1)) continue;
          const std::uintptr_t address = request.addresses[lane];
          for (std::uintptr_t word = address / 4; 4 * word < address + request.bytes; ++word)
            words += of_bank[word % 32].insert(word).second;
        }
        for (const auto& bank : of_bank) most = std::max(most, bank.size());
        cost.transactions += most;
        cost.ideal += (words + 31) / 32;
      }
    } else {
      std::set<std::uintptr_t> different, sectors;
      for (int lane = 0; lane < 32; ++lane)
        if (request.lanes >> lane & 1) different.insert(request.addresses[lane]);
      for (const std::uintptr_t address : different) sectors.insert(address / 32);
      cost.transactions += sectors.size();
      cost.ideal += (different.size() * request.bytes + 31) / 32;
    }
  }
  requests_.clear();
  times_.clear();
}

std::vector<Cost> Accesses::costs() const {
  std::vector<std::uint32_t> addresses;
  for (const auto& [key, cost] : costs_) {
    addresses.push_back(key.first + 1);
    addresses.push_back(key.second.first);
  }
  const auto names = symbols(addresses);
  std::vector<Cost> result;
  for (const auto& [key, cost] : costs_) {
    result.push_back(cost);
    result.back().kernel = names[2 * (result.size() - 1)].first;
    result.back().line = names[2 * (result.size() - 1) + 1].second;
  }
  return result;
}

// ---- from addresses to lines ---------------------------------------------------------------------------

std::uint32_t Accesses::relative(const void* pc) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(pc) - __ehdr_start - 1);
}

std::vector<std::pair<std::string, std::string>> symbols(const std::vector<std::uint32_t>& addresses) {
  Dl_info info{};
  dladdr(__ehdr_start, &info);
  std::vector<std::pair<std::string, std::string>> found;
  for (std::size_t first = 0; first < addresses.size(); first += 500) {  // a command line has an end
    std::string command = std::string("addr2line -fiCp -e '") + info.dli_fname + "'";
    const std::size_t end = std::min(addresses.size(), first + 500);
    char text[4096];
    for (std::size_t i = first; i < end; ++i) {
      std::snprintf(text, sizeof text, " 0x%" PRIx32, addresses[i]);
      command += text;
    }
    FILE* out = popen((command + " 2>/dev/null").c_str(), "r");
    while (out != nullptr && std::fgets(text, sizeof text, out) != nullptr) {
      const std::string line(text, std::strcspn(text, "\n"));
      const std::size_t at = line.rfind(" at ");
      if (at == std::string::npos) continue;
      std::string place = line.substr(std::max(at + 4, line.rfind('/') + 1));
      place.resize(std::min(place.size(), place.find(' ')));
      const bool inlined = line.rfind(" (inlined by) ", 0) == 0;
      if (!inlined) found.emplace_back("", place);
      if (found.empty()) continue;
      auto& [function, where] = found.back();
      function = line.substr(inlined ? 14 : 0, at - (inlined ? 14 : 0));
      // The innermost line that is a kernel's own stands first.
      if (inlined && where.find(".cu:") == std::string::npos && place.find(".cu:") != std::string::npos)
        where = place + " (" + where + ")";
    }
    if (out != nullptr) pclose(out);
    found.resize(end, {"?", "?"});
  }
  return found;
}

std::string with_lines(const std::string& text) {
  std::string result = text;
  for (std::size_t at; (at = result.find("@0x")) != std::string::npos;) {
    const std::size_t end = result.find_first_not_of("0123456789abcdef", at + 3);
    const auto address = std::strtoul(result.substr(at + 3, end - at - 3).c_str(), nullptr, 16);
    result.replace(at, end - at, symbols({static_cast<std::uint32_t>(address)})[0].second);
  }
  return result;
}

}  // namespace cuda_emulation

// ---- what the compiler calls ---------------------------------------------------------------------------

#define CUDA_EMULATION_ACCESS(name, write, bytes)                                                    \
  CUDA_EMULATION_HIDDEN void __tsan_##name(void* pointer) {                                          \
    using cuda_emulation::accesses;                                                                  \
    if (reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0) accesses.misaligned(pointer, bytes); \
    accesses.access(pointer, bytes, write, __builtin_return_address(0));                             \
  }
CUDA_EMULATION_ACCESS(read1, false, 1)
CUDA_EMULATION_ACCESS(read2, false, 2)
CUDA_EMULATION_ACCESS(read4, false, 4)
CUDA_EMULATION_ACCESS(read8, false, 8)
CUDA_EMULATION_ACCESS(read16, false, 16)
CUDA_EMULATION_ACCESS(write1, true, 1)
CUDA_EMULATION_ACCESS(write2, true, 2)
CUDA_EMULATION_ACCESS(write4, true, 4)
CUDA_EMULATION_ACCESS(write8, true, 8)
CUDA_EMULATION_ACCESS(write16, true, 16)
#undef CUDA_EMULATION_ACCESS

CUDA_EMULATION_HIDDEN void __tsan_read_range(void* pointer, std::size_t bytes) {
  cuda_emulation::accesses.access(pointer, bytes, false, __builtin_return_address(0));
}
CUDA_EMULATION_HIDDEN void __tsan_write_range(void* pointer, std::size_t bytes) {
  cuda_emulation::accesses.access(pointer, bytes, true, __builtin_return_address(0));
}

// Of host code: constructors, and atomic variables.
CUDA_EMULATION_HIDDEN void __tsan_init() {}
CUDA_EMULATION_HIDDEN void __tsan_vptr_update(void**, void*) {}
#define CUDA_EMULATION_ATOMICS(bits)                                                                     \
  CUDA_EMULATION_HIDDEN std::uint##bits##_t __tsan_atomic##bits##_load(                                  \
      const volatile std::uint##bits##_t* p, int) {                                                      \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                      \
  CUDA_EMULATION_HIDDEN void __tsan_atomic##bits##_store(volatile std::uint##bits##_t* p,                \
                                                         std::uint##bits##_t v, int) {                   \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                      \
  CUDA_EMULATION_HIDDEN int __tsan_atomic##bits##_compare_exchange_strong(                               \
      volatile std::uint##bits##_t* p, std::uint##bits##_t* expected, std::uint##bits##_t v, int, int) { \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);       \
  }                                                                                                      \
  CUDA_EMULATION_UPDATE(bits, exchange, __atomic_exchange_n)                                             \
  CUDA_EMULATION_UPDATE(bits, fetch_add, __atomic_fetch_add)                                             \
  CUDA_EMULATION_UPDATE(bits, fetch_sub, __atomic_fetch_sub)                                             \
  CUDA_EMULATION_UPDATE(bits, fetch_and, __atomic_fetch_and)                                             \
  CUDA_EMULATION_UPDATE(bits, fetch_or, __atomic_fetch_or)
#define CUDA_EMULATION_UPDATE(bits, name, function)                                                       \
  CUDA_EMULATION_HIDDEN std::uint##bits##_t __tsan_atomic##bits##_##name(volatile std::uint##bits##_t* p, \
                                                                         std::uint##bits##_t v, int) {    \
    return function(p, v, __ATOMIC_SEQ_CST);                                                              \
  }
CUDA_EMULATION_ATOMICS(8)
CUDA_EMULATION_ATOMICS(16)
CUDA_EMULATION_ATOMICS(32)
CUDA_EMULATION_ATOMICS(64)
#undef CUDA_EMULATION_ATOMICS
#undef CUDA_EMULATION_UPDATE
