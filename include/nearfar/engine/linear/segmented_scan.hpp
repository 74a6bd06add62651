#pragma once

#include <nearfar/context.hpp>
#include <nearfar/engine/linear/chunked_state.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Which queries stand beside which keys as a sum over keys runs along a sequence. The queries before `first_query` see
/// nothing. `first_query` sees the first `keys_before` keys and, if causal, the one that stands beside it; every
/// further query sees one more.
struct Alignment {
  Index first_query = 0;
  Index query_count = 0;
  Index keys_before = 0;
  Index key_count = 0;
};

/// A stretch of a sequence: its queries and keys stand beside each other, chunk by chunk, from their first on.
struct Segment {
  Range query;
  Range key;
};

/// Up to chunk_tokens queries and keys that stand beside each other.
struct Chunk {
  Index query;    ///< the first
  Index queries;  ///< how many
  Index key;
  Index keys;
};

/// The fixed division of a sequence into segments: first the keys that every query sees, then queries with the keys
/// beside them.
class Segments {
 public:
  static constexpr Index length = 32 * chunk_tokens;

  explicit Segments(const Alignment& a)
      : a_(a), before_(pieces(a.keys_before)), beside_(pieces(a.query_count - a.first_query)) {}

  Index count() const { return before_ + beside_; }

  Segment operator[](Index s) const {
    if (s < before_) return {{}, piece(0, a_.keys_before, s)};
    return {piece(a_.first_query, a_.query_count, s - before_), piece(a_.keys_before, a_.key_count, s - before_)};
  }

 private:
  static Index pieces(Index tokens) { return ceil_div(tokens, length); }
  static Range piece(Index first, Index end, Index s) {
    return {std::min(first + s * length, end), std::min(first + (s + 1) * length, end)};
  }

  Alignment a_;
  Index before_;
  Index beside_;
};

/// Sums over all segments so far, and beside each what rounding has given it too much (Kahan's summation): else a
/// stream that takes tokens one by one would lose more of each, and in float all of those beyond 2^24.
template <class T>
struct CarriedSums {
  T* sum;
  T* excess;

  CarriedSums clear(Index numbers) const {
    std::fill_n(sum, numbers, T(0));
    std::fill_n(excess, numbers, T(0));
    return *this;
  }

  void copy_from(const CarriedSums& other, Index numbers) const {
    if (other.sum == sum) return;
    std::copy_n(other.sum, numbers, sum);
    std::copy_n(other.excess, numbers, excess);
  }

  void add(const T* local, Index numbers) const {
    for (Index i = 0; i < numbers; ++i) {
      const T term = local[i] - excess[i];
      const T now = sum[i] + term;
      excess[i] = (now - sum[i]) - term;
      sum[i] = now;
    }
  }
};

/// What one visit of a scan has to do: a segment of a sequence, for some of its heads.
template <class T>
struct ScanStep {
  Index sequence;
  Segment segment;
  Range heads;
  RunningSums<T> sums;  ///< of all these heads, one after another
  bool sums_only;       ///< whether the segment is visited for its sum alone

  /// The sums from `offset` on, as a chunk adds to them: after the last one of the segment only `local` is read.
  RunningSums<T> sums_from(Index offset, const Chunk& chunk) const {
    RunningSums<T> own = sums.from(offset);
    own.grows &= chunk.query + chunk.queries < segment.query.end || chunk.key + chunk.keys < segment.key.end;
    return own;
  }

  /// Calls visit(chunk, head) for the chunks of the segment in turn, heads innermost because they share pages and cache
  /// lines. Before each it calls announce(chunk, head) with the one that comes next, which is empty after the last.
  template <class Announce, class Visit>
  void for_each_chunk(Announce&& announce, Visit&& visit) const {
    const auto chunk = [&](Index at) {
      return Chunk{segment.query.first + at, std::clamp<Index>(segment.query.count() - at, 0, chunk_tokens),
                   segment.key.first + at, std::clamp<Index>(segment.key.count() - at, 0, chunk_tokens)};
    };
    for (Index at = 0; at < std::max(segment.query.count(), segment.key.count()); at += chunk_tokens) {
      for (Index head = heads.first; head < heads.end; ++head) {
        if (head + 1 < heads.end) {
          announce(chunk(at), head + 1);
        } else {
          announce(chunk(at + chunk_tokens), heads.first);
        }
        visit(chunk(at), head);
      }
    }
  }
};

/// Runs along all sequences and heads, in parallel and in fixed order, carrying running sums of `size` numbers a head.
///
///   alignment(b)                      the Alignment of sequence b
///   begin(b, heads, room)             the sums with which sequence b begins: zeros in `room`, or those of a stream
///                                     where they stand, which go on
///   visit(step, scratch)              does one segment; step.sums.local is zero and step.sums.running the past
///   finish(b, heads, total)           reads the sums over the whole sequence
///
/// Where one head of the longest sequence is no more than a thread's share, or a single segment, each sequence runs
/// from its first segment to its last. Else the segments themselves are shared out, in two rounds: the sums of all
/// segments, then, each knowing its past, the segments. Both give the same bits. Memory: four states a head and thread,
/// or two a head and segment.
template <class T>
void scan(Work& work, Index sequences, Index heads, Index size, FunctionRef<Alignment(Index)> alignment,
          FunctionRef<CarriedSums<T>(Index, Range, CarriedSums<T>)> begin,
          FunctionRef<void(const ScanStep<T>&, Scratch&)> visit, FunctionRef<void(Index, Range, const T*)> finish) {
  const auto step = [&](Index b, const Segment& segment, Range block, T* past, T* local, bool sums_only,
                        Scratch& scratch) {
    const Index numbers = block.count() * size;
    // A single chunk leaves what came before it as it was.
    const bool grows = !sums_only && std::max(segment.query.count(), segment.key.count()) > chunk_tokens;
    T* const running = sums_only ? nullptr : grows ? scratch.take<T>(numbers) : past;
    if (grows) std::copy_n(past, numbers, running);
    std::fill_n(local, numbers, T(0));
    visit(ScanStep<T>{b, segment, block, {local, running, grows}, sums_only}, scratch);
  };
  // Without queries a segment is visited for its sum.
  const auto has_queries = [](const Segment& segment) { return segment.query.count() > 0; };
  Index tokens = 0, longest = 1;
  for (Index b = 0; b < sequences; ++b) {
    const Alignment a = alignment(b);
    const Index own = std::max(a.query_count, a.key_count);
    tokens += own;
    longest = std::max(longest, own);
  }
  if (heads * tokens >= work.threads() * longest || longest <= Segments::length) {
    // Neighbouring heads share cache lines and pages: as many together as leave every thread enough to do.
    const Index tasks = work.threads() == 1 ? 1 : 2 * work.threads();
    const Index block = std::clamp<Index>(heads * tokens / (tasks * longest), 1, heads);
    const Index blocks = ceil_div(heads, block);
    work.for_each(sequences * blocks, [&](Index task, Scratch& scratch) {
      const Index b = task / blocks;
      const Range mine{task % blocks * block, std::min(heads, (task % blocks + 1) * block)};
      const Index numbers = mine.count() * size;
      const CarriedSums<T> past = begin(b, mine, {scratch.take<T>(numbers), scratch.take<T>(numbers)});
      T* local = scratch.take<T>(numbers);
      const Segments segments(alignment(b));
      for (Index s = 0; s < segments.count(); ++s) {
        const Scratch::Scope scope(scratch);
        step(b, segments[s], mine, past.sum, local, !has_queries(segments[s]), scratch);
        past.add(local, numbers);
      }
      finish(b, mine, past.sum);
    });
    return;
  }
  for (Index b = 0; b < sequences; ++b) {
    const Segments segments(alignment(b));
    const Index count = segments.count();
    // Segment s of head h: its past stands at past(s, h), its sum at local(s, h).
    T* pasts = work.take<T>((count + 1) * heads * size);
    T* locals = work.take<T>(count * heads * size);
    T* excess = work.take<T>(heads * size);
    const auto past = [&](Index s, Index h) { return pasts + (h * (count + 1) + s) * size; };
    const auto local = [&](Index s, Index h) { return locals + (h * count + s) * size; };
    const auto add_up = [&](Index h, bool stay) {
      CarriedSums<T> sums{past(0, h), excess + h * size};
      const CarriedSums<T> begun = begin(b, Range{h, h + 1}, sums);
      sums.copy_from(begun, size);
      for (Index s = 0; s < count; ++s) {
        sums.sum = past(s + 1, h);
        std::copy_n(past(s, h), size, sums.sum);
        sums.add(local(s, h), size);
      }
      if (stay && begun.sum != past(0, h)) begun.copy_from(sums, size);
    };
    work.for_each(count * heads, [&](Index task, Scratch& scratch) {
      const Index h = task % heads;
      const Index s = task / heads;
      step(b, segments[s], {h, h + 1}, past(0, h), local(s, h), true, scratch);
    });
    work.for_each(heads, [&](Index h, Scratch&) { add_up(h, false); });
    work.for_each(count * heads, [&](Index task, Scratch& scratch) {
      const Index h = task % heads;
      const Index s = task / heads;
      if (has_queries(segments[s])) step(b, segments[s], {h, h + 1}, past(s, h), local(s, h), false, scratch);
    });
    for (Index h = 0; h < heads; ++h) {
      add_up(h, true);
      finish(b, Range{h, h + 1}, past(count, h));
    }
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
