#pragma once

#include <nearfar/detail/function_ref.hpp>
#include <nearfar/detail/scratch.hpp>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// How many processors this process may run on, which can be fewer than the machine has.
inline int available_processors() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  const unsigned offered = std::thread::hardware_concurrency();
  return offered == 0 ? 1 : static_cast<int>(offered);
}

/// Waits for no longer than waking a thread takes.
template <class Condition>
void spin_until(Condition&& happened) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + std::chrono::microseconds(40);
  while (!happened() && Clock::now() < end) {
  }
}

/// Threads that share out numbered tasks: the caller and `size - 1` waiting threads.
///
/// Idle threads sleep on a condition variable, because threads that go on spinning collapse on a busy machine; but for
/// a moment they do spin: one call hands out several jobs, and to wake a thread costs as much as a small one. The
/// caller waits only for threads that have begun a task, so one that the system never wakes costs nothing. Which thread
/// runs which task is left to chance: tasks must not depend on it.
class ThreadPool {
 public:
  explicit ThreadPool(int size) : threads_(static_cast<std::size_t>(size - 1)) {
    try {
      for (int worker = 1; std::thread & thread : threads_) {
        thread = std::thread([this, worker] { serve(worker); });
        ++worker;
      }
    } catch (...) {
      dismiss();
      throw;
    }
  }

  ~ThreadPool() { dismiss(); }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  /// Runs task(index, worker) once for each index in [0, count), begun in that order, worker in [0, size). Throws the
  /// first exception that a task threw, after all threads have stopped.
  void run(Index count, FunctionRef<void(Index, int)> task) {
    if (count <= 0) return;
    if (count == 1 || threads_.empty()) {
      for (Index index = 0; index < count; ++index) task(index, 0);
      return;
    }
    Job job{count, task};
    {
      std::lock_guard lock(mutex_);
      job_ = &job;
      ++generation_;
    }
    wake_.notify_all();
    work(job, 0);
    spin_until([this] { return busy_ == 0; });
    std::unique_lock lock(mutex_);
    job_ = nullptr;
    idle_.wait(lock, [this] { return busy_ == 0; });
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  struct Job {
    Index count;
    FunctionRef<void(Index, int)> task;
    std::atomic<Index> next{0};
    std::exception_ptr error{};
    std::atomic_flag failed{};
  };

  static void work(Job& job, int worker) {
    try {
      for (Index index; (index = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) {
        job.task(index, worker);
      }
    } catch (...) {
      if (!job.failed.test_and_set()) job.error = std::current_exception();
      job.next = job.count;
    }
  }

  void serve(int worker) {
    std::uint64_t seen = 0;
    while (true) {
      spin_until([&] { return generation_ != seen; });
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return dismissed_ || (job_ != nullptr && generation_ != seen); });
      if (dismissed_) return;
      seen = generation_;
      Job& job = *job_;
      ++busy_;
      lock.unlock();
      work(job, worker);
      lock.lock();
      if (--busy_ == 0) idle_.notify_one();
    }
  }

  void dismiss() {
    {
      std::lock_guard lock(mutex_);
      dismissed_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  Job* job_ = nullptr;
  // These two are written under the lock, but read without it.
  std::atomic<std::uint64_t> generation_ = 0;
  std::atomic<int> busy_ = 0;
  bool dismissed_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
