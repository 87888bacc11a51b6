// Notices that nothing has happened for a while.
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

}  // namespace cuda_emulation
