#pragma once

#include <nearfar/attention.hpp>

#include <algorithm>
#include <concepts>
#include <limits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

/// How far a query sees to either side, both ends inclusive: key j is visible to query i iff i - left <= j <= i +
/// right. (The FMMformer code's "band b" is left = right = b - 1; its causal band b is left = b - 1, right = 0.)
struct Window {
  static constexpr Index unlimited = std::numeric_limits<Index>::max() / 4;

  Index left = unlimited;
  Index right = unlimited;

  /// The same window with the later keys out of sight.
  Window causal() const { return {left, 0}; }

  bool operator==(const Window&) const = default;
};

/// The numbers first .. end - 1: of tokens, rows, tiles or heads.
struct Range {
  Index first = 0;
  Index end = 0;

  Index count() const { return std::max<Index>(end - first, 0); }
};

/// Which keys each query of one sequence may see by their places alone: an interval that moves along with the query.
///
/// Where there are more keys than queries the two are aligned at the end: query i stands at key position
/// i + (n_k - n_q), so that new tokens see their past. Full attention is the unlimited window, causal attention the
/// window with right = 0.
class Band {
 public:
  Band(Window window, Index query_count, Index key_count)
      : left_(std::min(window.left, Window::unlimited)),
        right_(std::min(window.right, Window::unlimited)),
        shift_(key_count - query_count),
        key_count_(key_count) {}

  /// The first key that query i sees, and the one after the last; nothing is visible where end <= first.
  Index first(Index query) const { return std::max<Index>(query + shift_ - left_, 0); }
  Index end(Index query) const { return std::clamp<Index>(query + shift_ + right_ + 1, 0, key_count_); }

  /// All keys that some query of [query, query + count) sees.
  Range seen_by_any(Index query, Index count) const { return {first(query), end(query + count - 1)}; }

  /// Those that every query of [query, query + count) sees: the tiles within need no mask.
  Range seen_by_all(Index query, Index count) const { return {first(query + count - 1), end(query)}; }

  /// The queries that see a key; they need not all exist.
  Range seeing(Index key) const { return {key - shift_ - right_, key - shift_ + left_ + 1}; }

 private:
  Index left_;
  Index right_;
  Index shift_;
  Index key_count_;
};

/// What answers as Band does: which keys some or all of a run of queries see, and which queries see a key.
template <class B>
concept Visibility = requires(const B& band, Index at) {
  { band.seen_by_any(at, at) } -> std::same_as<Range>;
  { band.seen_by_all(at, at) } -> std::same_as<Range>;
  { band.seeing(at) } -> std::same_as<Range>;
};

/// The rows of one sequence of a packed batch.
struct Sequence {
  Index query_begin = 0;
  Index query_count = 0;
  Index key_begin = 0;
  Index key_count = 0;
};

/// How many sequences the inputs hold: one where there are no offsets.
template <class Scalar>
Index sequence_count(const Inputs<Scalar>& inputs) {
  return inputs.query_offsets.empty() ? 1 : static_cast<Index>(inputs.query_offsets.size()) - 1;
}

/// The rows of sequence b.
template <class Scalar>
Sequence sequence(const Inputs<Scalar>& inputs, Index b) {
  if (inputs.query_offsets.empty()) return {0, inputs.query.rows(), 0, inputs.key.rows()};
  const auto keys = inputs.key_offsets.empty() ? inputs.query_offsets : inputs.key_offsets;
  const auto at = static_cast<std::size_t>(b);
  return {inputs.query_offsets[at], inputs.query_offsets[at + 1] - inputs.query_offsets[at], keys[at],
          keys[at + 1] - keys[at]};
}

/// The key mask, of all keys or of those from the sequence's first on, or null where every key may be seen.
template <class Scalar>
const std::uint8_t* key_mask(const Inputs<Scalar>& inputs, const Sequence& sequence = {}) {
  return inputs.key_mask.empty() ? nullptr : inputs.key_mask.data() + sequence.key_begin;
}

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
