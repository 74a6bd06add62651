#pragma once

#include <nearfar/detail/parallel.hpp>
#include <nearfar/engine/tiles.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Tokens of one sequence that one task of a streaming pass goes through.
struct Stretch {
  Index sequence = 0;
  Index first = 0;  ///< among the rows of the batch
  Index count = 0;

  Index end() const { return first + count; }
};

/// All sequences of a batch, divided into stretches by their lengths alone: sums over stretches, taken in order, do not
/// depend on threads. An empty sequence has none.
class Stretches : public Tiles {
 public:
  /// length(tokens) is how many tokens a stretch has in a sequence of `tokens`; the last may have fewer.
  template <class Scalar, class Length>
  Stretches(Work& work, const Inputs<Scalar>& inputs, Length&& length)
      : Tiles(
            work, sequence_count(inputs), [&](Index b) { return sequence(inputs, b).query_count; },
            [&](Index b) { return length(sequence(inputs, b).query_count); }),
        offsets_(inputs.query_offsets) {}

  Stretch operator[](Index s) const {
    const Tile tile = Tiles::operator[](s);
    const Index begin = offsets_.empty() ? 0 : offsets_[static_cast<std::size_t>(tile.sequence)];
    return {tile.sequence, begin + tile.first, tile.count};
  }

  /// Groups of neighbours, for sums over all tokens of which each group keeps a part: few, whatever the batch.
  Index groups() const { return std::min<Index>(count(), 64); }
  Range group(Index g) const { return {count() * g / groups(), count() * (g + 1) / groups()}; }

 private:
  List<Index> offsets_;
};

/// The stretches of each sequence, or of the whole batch, take turns in their order, or in the reverse, while the rest
/// of what their tasks do runs side by side. Tasks must be started in that order: then some task can always go on.
class Turns {
 public:
  enum Order { first_first, last_first, last_of_batch_first };

  Turns(Work& work, const Stretches& stretches, Order order = first_first)
      : stretches_(stretches),
        order_(order),
        // In the memory of the call; not atomic_ref, which libc++ has had since its version 19 only.
        passed_(reinterpret_cast<std::atomic<Index>*>(
            work.take<std::byte>(stretches.sequences() * Index{sizeof(std::atomic<Index>)}))) {
    for (Index b = 0; b < stretches.sequences(); ++b) std::construct_at(passed_ + b, 0);
  }

  /// Calls body() when all stretches before s (in the reverse order: behind s) have had their turn.
  template <class Body>
  void take(Index s, Body&& body) const {
    const auto comes = [&] { return passed(s).load(std::memory_order_acquire) == place(s); };
    spin_until(comes);
    if (!comes()) {
      std::unique_lock lock(mutex_);
      passed_one_.wait(lock, comes);
    }
    body();
    {
      std::lock_guard lock(mutex_);
      passed(s).store(place(s) + 1, std::memory_order_release);
    }
    passed_one_.notify_all();
  }

  /// To be held by a task from its beginning: if it ends by an exception, the others do not wait for its turn forever.
  class Promise {
   public:
    Promise(const Turns& turns, Index s) : turns_(turns), s_(s) {}
    ~Promise() {
      if (turns_.passed(s_).load(std::memory_order_relaxed) <= turns_.place(s_)) turns_.take(s_, [] {});
    }
    Promise(const Promise&) = delete;
    Promise& operator=(const Promise&) = delete;

   private:
    const Turns& turns_;
    Index s_;
  };

 private:
  /// How many turns have passed of those among which is that of stretch s.
  std::atomic<Index>& passed(Index s) const {
    return passed_[order_ == last_of_batch_first ? 0 : stretches_[s].sequence];
  }

  /// How many turns come before that of stretch s.
  Index place(Index s) const {
    if (order_ == last_of_batch_first) return stretches_.count() - 1 - s;
    const Range all = stretches_.of(stretches_[s].sequence);
    return order_ == first_first ? s - all.first : all.end - 1 - s;
  }

  const Stretches& stretches_;
  Order order_;
  std::atomic<Index>* passed_;
  // Not the wait of atomics: where there is no futex, libstdc++ loses wakings.
  mutable std::mutex mutex_;
  mutable std::condition_variable passed_one_;
};

/// Calls run(first, count) for the longest runs of wanted numbers in [first, end), and other(number) for the rest.
template <class Wanted, class Run, class Other>
void for_each_run(Index first, Index end, Wanted&& wanted, Run&& run, Other&& other) {
  while (first < end) {
    Index next = first;
    while (next < end && wanted(next)) ++next;
    if (next > first) run(first, next - first);
    for (first = next; first < end && !wanted(first); ++first) other(first);
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
