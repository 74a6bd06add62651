#pragma once

#include <nearfar/context.hpp>
#include <nearfar/detail/simd.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The landmarks of a packed batch. Each sequence of n tokens is cut into r segments as equal as can be,
///
///   segment t = 0 .. r - 1:   tokens floor(t n / r) .. floor((t + 1) n / r) - 1,
///
/// and a segment has a landmark, the mean of its tokens, if it has a token that is not masked. Landmarks are numbered
/// throughout the batch; those of sequence b are offsets()[b] .. offsets()[b + 1] - 1.
class Landmarks {
 public:
  template <class T>
  Landmarks(Work& work, const Inputs<T>& inputs, Index per_sequence)
      : mask_(key_mask(inputs)), sequences_(sequence_count(inputs)) {
    Index most = 0;
    for (Index b = 0; b < sequences_; ++b) most += std::min(per_sequence, sequence(inputs, b).key_count);
    offsets_ = work.take<Index>(sequences_ + 1);
    segments_ = work.take<Segment>(most);
    offsets_[0] = 0;
    for (Index b = 0; b < sequences_; ++b) {
      const Sequence rows = sequence(inputs, b);
      const Index segments = std::min(per_sequence, rows.key_count);
      offsets_[b + 1] = offsets_[b];
      for (Index t = 0; t < segments; ++t) {
        const Range tokens{rows.key_begin + t * rows.key_count / segments,
                           rows.key_begin + (t + 1) * rows.key_count / segments};
        Index visible = 0;
        for (Index i = tokens.first; i < tokens.end; ++i) visible += seen(i);
        if (visible > 0) segments_[offsets_[b + 1]++] = {tokens, visible};
      }
    }
  }

  Index count() const { return offsets_[sequences_]; }
  List<Index> offsets() const { return {offsets_, static_cast<std::size_t>(sequences_) + 1}; }

  /// The landmarks of sequence b.
  Range of(Index b) const { return {offsets_[b], offsets_[b + 1]}; }

  /// How many a sequence has at most.
  Index most() const {
    Index most = 0;
    for (Index b = 0; b < sequences_; ++b) most = std::max(most, of(b).count());
    return most;
  }

  /// Inputs in which landmark queries stand in the place of the queries.
  template <class T>
  Inputs<T> as_queries(const Inputs<T>& inputs, Tokens<const T> query) const {
    const List<Index> keys = inputs.key_offsets.empty() ? inputs.query_offsets : inputs.key_offsets;
    return {query, inputs.key, inputs.value, inputs.key_mask, keys.empty() ? keys : offsets(), keys};
  }

  /// Inputs in which landmarks stand in the place of keys and values.
  template <class T>
  Inputs<T> as_keys(const Inputs<T>& inputs, Tokens<const T> key, Tokens<const T> value) const {
    const List<Index> queries = inputs.query_offsets;
    return {inputs.query, key, value, {}, queries, queries.empty() ? queries : offsets()};
  }

  /// landmark_l = the mean over the visible tokens of its segment. Each head of `tokens`, of width dim, is held `group`
  /// times. Time O(n), reads whole rows in order.
  template <class T>
  void average(Work& work, Tokens<const T> tokens, Index dim, Index group, Tokens<T> landmarks) const {
    const Index cols = tokens.cols();
    work.for_each(count(), [&](Index l, Scratch& scratch) {
      const Segment& segment = segments_[l];
      T* const mean = landmarks.row(l);
      T* const part = scratch.take<T>(cols);
      std::fill_n(mean, cols, T(0));
      // Sums of short sums keep the rounding errors small.
      for (Index first = segment.tokens.first; first < segment.tokens.end; first += short_sum) {
        std::fill_n(part, cols, T(0));
        for (Index i = first; i < std::min(first + short_sum, segment.tokens.end); ++i) {
          if (seen(i)) add_row(cols, part, tokens.row(i));
        }
        add_row(cols, mean, part);
      }
      const T share = T(1) / static_cast<T>(segment.visible);
      for (Index c = 0; c < cols; ++c) mean[c] *= share;
      for (Index h = group == 1 ? 0 : landmarks.cols() / dim; h-- > 0;) {
        std::copy_n(landmarks.row(l) + h / group * dim, dim, landmarks.row(l) + h * dim);
      }
    });
  }

  /// The gradient of `average`: each visible token of a segment takes an equal share of its landmark's gradient, summed
  /// over the `group` heads that held it, and adds it to its own.
  template <class T>
  void add_average_gradient(Work& work, Tokens<const T> grad_landmarks, Index dim, Index group,
                            Tokens<T> grad_tokens) const {
    const Index cols = grad_tokens.cols();
    work.for_each(count(), [&](Index l, Scratch& scratch) {
      const Segment& segment = segments_[l];
      T* const share = scratch.take<T>(cols);
      std::fill_n(share, cols, T(0));
      for (Index h = 0; h < grad_landmarks.cols() / dim; ++h) {
        T* const of_group = share + h / group * dim;
        add_row(dim, of_group, grad_landmarks.row(l) + h * dim);
      }
      for (Index c = 0; c < cols; ++c) share[c] /= static_cast<T>(segment.visible);
      for (Index i = segment.tokens.first; i < segment.tokens.end; ++i) {
        if (seen(i)) add_row(cols, grad_tokens.row(i), share);
      }
    });
  }

 private:
  struct Segment {
    Range tokens;
    Index visible;
  };

  static constexpr Index short_sum = 64;

  bool seen(Index token) const { return mask_ == nullptr || mask_[token] != 0; }

  const std::uint8_t* mask_;
  Index sequences_;
  Index* offsets_;
  Segment* segments_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
