#include "runtime/workers.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace fastkd::runtime {
namespace {

int process() {
#if defined(__unix__) || defined(__APPLE__)
  return (int)getpid();
#else
  return 1;
#endif
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

constexpr int kSpins = 2000;  // some 50 microseconds: the layers of one answer follow each other closely

}  // namespace

class Team {
 public:
  explicit Team(int threads) {
    threads_.reserve(threads);
    try {
      for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { serve(); });
    } catch (const std::system_error&) {  // a limit of the system: fewer threads give the same answer
    }
  }

  ~Team() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      ++round_;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // Nobody is waited for who has not begun: a thread that the system is slow to run must not hold up the others.
  void run(int64_t count, const std::function<void(int64_t)>& f) {
    keep_off_this_cpu();
    {
      std::lock_guard lock(mutex_);
      job_ = &f;
      count_ = count;
      next_ = 0;
      error_ = nullptr;
      open_ = true;
      ++round_;
    }
    wake_.notify_all();
    work();
    {
      std::lock_guard lock(mutex_);
      open_ = false;
    }
    for (int spin = 0; spin < kSpins && helping_.load(std::memory_order_acquire) > 0; ++spin) pause();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return helping_.load() == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // To a guest its sleeping CPUs may look taken: then it wakes a thread on the very CPU that works, where it waits.
  void keep_off_this_cpu() {
#if defined(__linux__)
    const int cpu = sched_getcpu();
    cpu_set_t others;
    if (cpu == left_alone_ || cpu < 0 || sched_getaffinity(0, sizeof others, &others) != 0) return;
    left_alone_ = cpu;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) == 0) return;
    for (std::thread& thread : threads_) pthread_setaffinity_np(thread.native_handle(), sizeof others, &others);
#endif
  }

  void work() {
    for (int64_t i; (i = next_.fetch_add(1)) < count_;) {
      try {
        (*job_)(i);
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
    }
  }

  void serve() {
    for (uint64_t seen = 0;;) {
      for (int spin = 0; spin < kSpins && round_.load(std::memory_order_acquire) == seen; ++spin) pause();
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return round_.load() != seen; });
        seen = round_.load();
        if (stop_) return;
        if (!open_) continue;
        ++helping_;
      }
      work();
      std::lock_guard lock(mutex_);
      if (helping_.fetch_sub(1) == 1) done_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* job_ = nullptr;
  int64_t count_ = 0;
  std::atomic<uint64_t> round_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> helping_{0};
  std::exception_ptr error_;
  bool open_ = false, stop_ = false;
  int left_alone_ = -1;
};

Workers::Workers(int threads) : threads_(threads) {}

Workers::~Workers() {
  if (owner_ != process()) (void)team_.release();  // its threads live in the parent: nothing here may wait for them
}

void Workers::run(int64_t count, const std::function<void(int64_t)>& f) {
  std::unique_lock busy(busy_, std::try_to_lock);
  if (threads_ <= 1 || count <= 1 || !busy) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  if (owner_ != process()) {
    (void)team_.release();
    team_ = std::make_unique<Team>(threads_);
    owner_ = process();
  }
  team_->run(count, f);
}

}  // namespace fastkd::runtime
