#pragma once

#include <nearfar/context.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>
#include <atomic>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Tokens of one sequence that one task of a streaming pass goes through.
struct Stretch {
  Index sequence;
  Index first;  ///< among the rows of the batch
  Index count;

  Index end() const { return first + count; }
};

/// All sequences of a batch, divided into stretches by their lengths alone: sums over stretches, taken in order, do not
/// depend on threads. An empty sequence has none.
class Stretches {
 public:
  /// length(tokens) is how many tokens a stretch has in a sequence of `tokens`; the last may have fewer.
  template <class Scalar, class Length>
  Stretches(Work& work, const Inputs<Scalar>& inputs, Length&& length)
      : sequences_(sequence_count(inputs)), begin_(work.take<Index>(sequences_ + 1)) {
    begin_[0] = 0;
    for (Index b = 0; b < sequences_; ++b) {
      const Index tokens = sequence(inputs, b).query_count;
      begin_[b + 1] = begin_[b] + (tokens + length(tokens) - 1) / length(tokens);
    }
    stretches_ = work.take<Stretch>(count());
    for (Index b = 0; b < sequences_; ++b) {
      const Sequence rows = sequence(inputs, b);
      const Index each = length(rows.query_count);
      for (Index i = 0; i * each < rows.query_count; ++i) {
        stretches_[begin_[b] + i] = {b, rows.query_begin + i * each, std::min(each, rows.query_count - i * each)};
      }
    }
  }

  Index count() const { return begin_[sequences_]; }
  const Stretch& operator[](Index s) const { return stretches_[s]; }

  Index sequences() const { return sequences_; }

  /// The stretches of sequence b.
  Range of(Index b) const { return {begin_[b], begin_[b + 1]}; }

 private:
  Index sequences_;
  Index* begin_;
  Stretch* stretches_;
};

/// The stretches of each sequence take turns in their order, while the rest of what their tasks do runs side by side.
/// Tasks must be started in the order of stretches: then some task can always go on.
class Turns {
 public:
  Turns(Work& work, const Stretches& stretches)
      : stretches_(stretches), passed_(work.take<Index>(stretches.sequences())) {
    std::fill_n(passed_, stretches.sequences(), Index{0});
  }

  /// Calls body() when all stretches before s in its sequence have had their turn.
  template <class Body>
  void take(Index s, Body&& body) const {
    const Turn turn(*this, s);
    body();
  }

 private:
  struct Turn {
    Turn(const Turns& turns, Index s)
        : passed(turns.passed_[turns.stretches_[s].sequence]),
          mine(s - turns.stretches_.of(turns.stretches_[s].sequence).first) {
      for (Index now; (now = passed.load(std::memory_order_acquire)) != mine;)
        passed.wait(now, std::memory_order_acquire);
    }
    ~Turn() {
      passed.store(mine + 1, std::memory_order_release);
      passed.notify_all();
    }
    std::atomic_ref<Index> passed;
    Index mine;
  };

  const Stretches& stretches_;
  Index* passed_;
};

/// Tokens that are only read are read in turn from this many places of a stretch, its strands: memory serves one reader
/// of several streams half as fast again as a reader of one. Where rows are written too, it does not.
inline constexpr Index strands = 3;

/// The most tokens that are listed at a time.
inline constexpr Index block_tokens = strands * 128;

/// Calls visit(numbers, count) with the numbers of those tokens of a stretch that `wanted(token)`, up to block_tokens
/// of them at a time, taken in turn from so many places.
template <class Wanted, class Visit>
void for_each_block(const Stretch& stretch, Index places, Wanted&& wanted, Visit&& visit) {
  Index tokens[block_tokens];
  for (Index first = stretch.first; first < stretch.end(); first += block_tokens) {
    const Index count = std::min(block_tokens, stretch.end() - first);
    const Index each = (count + places - 1) / places;
    Index listed = 0;
    for (Index i = 0; i < each; ++i) {
      for (Index j = i; j < count; j += each) {
        if (wanted(first + j)) tokens[listed++] = first + j;
      }
    }
    visit(static_cast<const Index*>(tokens), listed);
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
