// Notices that nothing has happened for a while, and accesses to memory that end a process.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <sys/time.h>

#include <cstdint>

namespace cuda_emulation {

// While it lives, calls `bark` once `progress` has not changed during half of `patience`, in seconds of
// processor time, or all of it. It is called in a signal handler, on the thread that made the watchdog, and
// need not return.
class Watchdog {
 public:
  Watchdog(double patience, const volatile std::uint64_t& progress, void (*bark)()) {
    state_ = {&progress, progress, bark, pthread_self()};
    struct sigaction action{};
    action.sa_handler = tick;
    action.sa_flags = SA_NODEFER | SA_RESTART;
    sigaction(SIGVTALRM, &action, &old_action_);
    const auto microseconds = static_cast<long>(patience / 2 * 1e6);
    const timeval period{microseconds / 1000000, microseconds % 1000000};
    const itimerval timer{period, period};
    setitimer(ITIMER_VIRTUAL, &timer, &old_timer_);
  }
  ~Watchdog() {
    setitimer(ITIMER_VIRTUAL, &old_timer_, nullptr);
    sigaction(SIGVTALRM, &old_action_, nullptr);
  }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  struct State {
    const volatile std::uint64_t* progress;
    std::uint64_t seen;
    void (*bark)();
    pthread_t owner;
  };

  static void tick(int signal) {
    if (!pthread_equal(pthread_self(), state_.owner)) {
      pthread_kill(state_.owner, signal);
    } else if (state_.seen != *state_.progress) {
      state_.seen = *state_.progress;
    } else {
      state_.bark();
    }
  }

  static inline State state_{};
  struct sigaction old_action_{};
  itimerval old_timer_{};
};

// While it lives, calls `bark` where the thread that made it accesses memory that is not there, or is not
// aligned as the processor wants it. It is called on a stack of its own, and must not return.
class FaultGuard {
 public:
  explicit FaultGuard(void (*bark)()) {
    bark_ = bark;
    owner_ = pthread_self();
    stack_t stack{};
    stack.ss_sp = stack_;
    stack.ss_size = sizeof stack_;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_handler = fault;
    action.sa_flags = SA_NODEFER | SA_ONSTACK;
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &old_actions_[i]);
  }
  ~FaultGuard() {
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &old_actions_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS};

  static void fault(int signal) {
    if (pthread_equal(pthread_self(), owner_)) bark_();
    ::signal(signal, SIG_DFL);  // it is none of ours: the process ends when the access is tried again
  }

  static inline void (*bark_)() = nullptr;
  static inline pthread_t owner_{};
  alignas(16) static inline unsigned char stack_[64 * 1024];
  stack_t old_stack_{};
  struct sigaction old_actions_[2] = {};
};

}  // namespace cuda_emulation
