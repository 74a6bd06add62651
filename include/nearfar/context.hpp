#pragma once

#include <nearfar/detail/parallel.hpp>
#include <nearfar/detail/scratch.hpp>

#include <algorithm>
#include <cstddef>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

namespace detail {
class Work;
}

/// Threads and working memory, kept from call to call.
///
/// Every call of attention takes one as its last argument, by default the process-wide `default_context()`. A context
/// serves one call at a time; a second caller waits its turn, so threads that should run side by side bring a context
/// each. Results do not depend on the number of threads. A second call of the same shapes and masks allocates nothing.
class Context {
 public:
  /// A context of `threads` threads, the caller's among them; 0 takes as many as there are processors for this process.
  explicit Context(int threads = 0) : pool_(checked(threads)), scratch_(static_cast<std::size_t>(pool_.size())) {}

  int threads() const { return pool_.size(); }

  /// Bytes of working memory held.
  std::size_t scratch_bytes() const {
    std::lock_guard lock(mutex_);
    std::size_t total = shared_.bytes();
    for (const detail::Scratch& scratch : scratch_) total += scratch.bytes();
    return total;
  }

  /// Gives the working memory back to the system.
  void release() {
    std::lock_guard lock(mutex_);
    shared_ = {};
    for (detail::Scratch& scratch : scratch_) scratch = {};
  }

 private:
  friend class detail::Work;

  static int checked(int threads) {
    if (threads < 0) {
      throw std::invalid_argument("nearfar::Context: threads must be 0 (all) or more, but is " +
                                  std::to_string(threads) + ".");
    }
    return threads > 0 ? threads : detail::available_processors();
  }

  mutable std::mutex mutex_;
  detail::ThreadPool pool_;
  detail::Scratch shared_;
  std::vector<detail::Scratch> scratch_;
};

/// The context of calls that name none: a thread for each processor, made at first use.
inline Context& default_context() {
  static Context context;
  return context;
}

namespace detail {

/// One call's hold on a context: its threads, and memory that lasts until the call ends.
class Work {
 public:
  explicit Work(Context& context)
      : lock_(context.mutex_), context_(&context), memory_(context.shared_), scope_(memory_) {}

  /// Work within a task of such a call: by its thread alone, with memory that lasts as long as this.
  explicit Work(Scratch& scratch) : memory_(scratch), scope_(memory_) {}

  /// Gives back, at the end of a scope, what was taken within it.
  class Scope {
   public:
    explicit Scope(Work& work) : scope_(work.memory_) {}

   private:
    Scratch::Scope scope_;
  };

  int threads() const { return context_ == nullptr ? 1 : context_->pool_.size(); }

  /// The task that a thread likely takes after this one: the others take those between.
  Index likely_next(Index task) const { return task + threads(); }

  /// Memory that all tasks may read, given back when the scope or else the call ends.
  template <class T>
  T* take(Index count) {
    return memory_.take<T>(count);
  }

  /// Runs task(index, scratch) for each index in [0, count), on any thread. Tasks begin in the order of their indices,
  /// which Turns relies on, and end in any; what a task takes of its scratch is given back when it ends.
  void for_each(Index count, FunctionRef<void(Index, Scratch&)> task) {
    const auto run = [&](Index index, Scratch& scratch) {
      const Scratch::Scope scope(scratch);
      task(index, scratch);
    };
    if (context_ == nullptr) {
      for (Index index = 0; index < count; ++index) run(index, memory_);
      return;
    }
    std::vector<Scratch>& scratch = context_->scratch_;
    context_->pool_.run(count, [&](Index index, int worker) { run(index, scratch[static_cast<std::size_t>(worker)]); });
    level(scratch);
  }

 private:
  // Which thread met the largest task is chance, so all hold what the largest needed: the next call allocates nothing.
  static void level(std::vector<Scratch>& scratches) {
    std::size_t most = 0;
    for (const Scratch& scratch : scratches) most = std::max(most, scratch.bytes());
    for (Scratch& scratch : scratches) scratch.reserve(most);
  }

  std::unique_lock<std::mutex> lock_;
  Context* context_ = nullptr;
  Scratch& memory_;
  Scratch::Scope scope_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
