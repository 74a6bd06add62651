#pragma once

#include <nearfar/engine/softmax/fresh_gradients.hpp>
#include <nearfar/engine/softmax/gradient_tile.hpp>
#include <nearfar/engine/softmax/narrow_window_backward.hpp>
#include <nearfar/engine/tiles.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The backward pass of window_attention for windows that are not narrow: gradients of query, key and value from the
/// saved log-sum-exp and delta, both heads.query x n_q.
///
/// A task is one key/value head of one segment of the keys of a sequence: it alone writes their gradients, and walks
/// over the queries that see them. Where a long sequence has several segments, the gradients of its queries are summed
/// over them in order, each further segment having rows of its own for the queries that see it. How many there are
/// depends on the shapes alone. Work 2.5 times the forward pass.
template <class Scalar>
class WideWindowBackward {
  using T = Accumulator<Scalar>;

 public:
  WideWindowBackward(const Heads& heads, Window window, double scale, const Inputs<Scalar>& inputs,
                     const double* log_sum_exp, Tokens<const Scalar> grad_out, const T* delta,
                     const InputGradients<Scalar>& gradients)
      : heads_(heads),
        window_(window),
        scale_(scale),
        inputs_(inputs),
        log_sum_exp_(log_sum_exp),
        grad_out_(grad_out),
        delta_(delta),
        gradients_(gradients),
        sequences_(sequence_count(inputs)) {
    Index longest = 1;
    for (Index b = 0; b < sequences_; ++b) longest = std::max(longest, sequence(inputs, b).key_count);
    tasks_ = std::max<Index>(inputs.key.rows() / longest, 1) * heads.key_value;
    segments_ = gradient_segments(longest, tasks_);
  }

  void backward(Work& work) {
    take_partial_rows(work);
    work.for_each(sequences_ * segments_ * heads_.key_value, [&](Index task, Scratch& scratch) {
      walk(task / heads_.key_value / segments_, task / heads_.key_value % segments_, task % heads_.key_value, scratch);
    });
    if (segments_ > 1) add_partial_rows(work);
  }

 private:
  // With more of them, queries and their weights would crowd what is fetched ahead out of the second-level cache.
  static constexpr Index keys_a_visit = 64;

  Band band(const Sequence& rows) const { return Band(window_, rows.query_count, rows.key_count); }

  /// The keys of segment s of a sequence: shorter ones have fewer, and then none.
  Range segment(const Sequence& rows, Index s) const {
    const Index count = gradient_segments(rows.key_count, tasks_);
    return {rows.key_count * std::min(s, count) / count, rows.key_count * std::min(s + 1, count) / count};
  }

  /// The queries that see one of these keys.
  Range seeing(const Sequence& rows, Range keys) const {
    if (keys.count() == 0) return {};
    return {std::clamp<Index>(band(rows).seeing(keys.first).first, 0, rows.query_count),
            std::clamp<Index>(band(rows).seeing(keys.end - 1).end, 0, rows.query_count)};
  }

  /// Takes rows for the queries that see each further segment.
  void take_partial_rows(Work& work) {
    first_row_ = work.take<Index>(sequences_ * segments_);
    Index rows_taken = 0;
    for (Index b = 0; b < sequences_; ++b) {
      const Sequence rows = sequence(inputs_, b);
      for (Index s = 1; s < segments_; ++s) {
        first_row_[b * segments_ + s] = rows_taken;
        rows_taken += seeing(rows, segment(rows, s)).count();
      }
    }
    partial_ = work.take<Scalar>(rows_taken * heads_.query_cols());
  }

  /// Where segment s leaves the gradients of the queries that see it.
  Tokens<Scalar> grad_query(Index b, Index s, Range queries) const {
    if (s == 0) return gradients_.query.middle_rows(sequence(inputs_, b).query_begin + queries.first, queries.count());
    return {partial_ + first_row_[b * segments_ + s] * heads_.query_cols(), queries.count(), heads_.query_cols(),
            heads_.query_cols()};
  }

  /// Walks over the queries that see segment s of sequence b, for one key/value head.
  void walk(Index b, Index s, Index key_head, Scratch& scratch) const {
    const Index dim = heads_.dim;
    const Index value_dim = heads_.value_width();
    const Sequence rows = sequence(inputs_, b);
    const Band band = this->band(rows);
    const std::uint8_t* mask = key_mask(inputs_, rows);
    const Range own = segment(rows, s);
    const Range queries = seeing(rows, own);
    if (s > 0 && own.count() == 0) return;
    const auto of_head = [&](const auto& tokens, Index width) {
      return tokens.middle_rows(rows.key_begin, rows.key_count).head(key_head, width);
    };
    const Tokens key = of_head(inputs_.key, dim);
    const Tokens value = of_head(inputs_.value, value_dim);
    const Tokens grad_key = of_head(gradients_.key, dim);
    const Tokens grad_value = of_head(gradients_.value, value_dim);

    GradientTile<T> tile(scratch, dim, value_dim);
    KeyTile<T> keys(scratch, dim, value_dim);
    const auto grad_key_row = [&](Index j) { return grad_key.row(keys.position(j)); };
    const auto grad_value_row = [&](Index j) { return grad_value.row(keys.position(j)); };
    FreshGradients<Scalar> fresh(grad_key, grad_value, own);
    for (Index h = key_head * heads_.group(); h < (key_head + 1) * heads_.group(); ++h) {
      const Tokens query = inputs_.query.head(h, dim);
      const Tokens grad = grad_out_.head(h, value_dim);
      const Tokens to = grad_query(b, s, queries).head(h, dim);
      if (s == 0) {
        const Tokens all = gradients_.query.middle_rows(rows.query_begin, rows.query_count).head(h, dim);
        all.middle_rows(0, queries.first).matrix().setZero();
        all.middle_rows(queries.end, rows.query_count - queries.end).matrix().setZero();
      }
      for (Index i = queries.first, count; i < queries.end; i += count) {
        count = std::min(GradientTile<T>::capacity, queries.end - i);
        const Index row = rows.query_begin + i;
        const Index of_query = h * inputs_.query.rows() + row;
        tile.load(query.middle_rows(row, count), grad.middle_rows(row, count), i, log_sum_exp_ + of_query,
                  delta_ + of_query, scale_);
        const Range seen = band.seen_by_any(i, count);
        const Index end = std::min(seen.end, own.end);
        for (Index j = std::max(seen.first, own.first); j < end;) {
          j = keys.take(key, value, mask, {j, end}, 0, keys_a_visit);
          const Range written = fresh.reach(keys, j);
          Lookahead& ahead = tile.lookahead();
          ahead.clear();
          const auto announce_keys = [&](Index first, Index last) {
            const Index keys_ahead = std::min(last - first, keys_a_visit);
            ahead.add(key.middle_rows(first, keys_ahead));
            ahead.add(value.middle_rows(first, keys_ahead));
            fresh.announce(ahead, first + keys_ahead);
          };
          announce_keys(j, end);
          const Index next = i + count;
          const Index queries_ahead = std::min(GradientTile<T>::capacity, queries.end - next);
          if (j == end) ahead.add(to.middle_rows(i - queries.first, count));
          if (j == end && queries_ahead > 0) {
            announce_keys(std::max(band.first(next), own.first), own.end);
            ahead.add(query.middle_rows(row + count, queries_ahead));
            ahead.add(grad.middle_rows(row + count, queries_ahead));
          }
          tile.visit(keys, band, written, grad_key_row, grad_value_row);
          keys.clear();
        }
        tile.finish(to.middle_rows(i - queries.first, count));
      }
    }
    fresh.finish();
  }

  /// Adds to the gradients of the queries, which the first segment has written, those of the others in order.
  void add_partial_rows(Work& work) const {
    const Tiles tiles(work, inputs_, 256);
    work.for_each(tiles.count(), [&](Index task, Scratch&) {
      const Tile tile = tiles[task];
      const Sequence rows = sequence(inputs_, tile.sequence);
      for (Index s = 1; s < segments_; ++s) {
        const Range part = seeing(rows, segment(rows, s));
        const Index first = std::max(part.first, tile.first);
        const Index count = std::min(part.end, tile.first + tile.count) - first;
        if (count <= 0) continue;
        gradients_.query.middle_rows(rows.query_begin + first, count).matrix() +=
            grad_query(tile.sequence, s, part).middle_rows(first - part.first, count).matrix();
      }
    });
  }

  const Heads& heads_;
  Window window_;
  double scale_;
  const Inputs<Scalar>& inputs_;
  const double* log_sum_exp_;
  Tokens<const Scalar> grad_out_;
  const T* delta_;
  const InputGradients<Scalar>& gradients_;
  Index sequences_;
  Index tasks_;                 // if all sequences were as long as the longest, of one segment each
  Index segments_;              // of the longest
  Index* first_row_ = nullptr;  // where the rows of a segment of a sequence begin
  Scalar* partial_ = nullptr;
};

template <class Scalar>
void wide_window_backward(Work& work, const Heads& heads, Window window, double scale, const Inputs<Scalar>& inputs,
                          const double* log_sum_exp, Tokens<const Scalar> grad_out, const Accumulator<Scalar>* delta,
                          const InputGradients<Scalar>& gradients) {
  WideWindowBackward<Scalar>(heads, window, scale, inputs, log_sum_exp, grad_out, delta, gradients).backward(work);
}

/// As above, by the way that suits the window. Where it is never narrow, the other alone compiles less.
template <class Scalar>
void window_backward(Work& work, const Heads& heads, Window window, double scale, const Inputs<Scalar>& inputs,
                     const double* log_sum_exp, Tokens<const Scalar> grad_out, const Accumulator<Scalar>* delta,
                     const InputGradients<Scalar>& gradients) {
  const NarrowWindowBackward<Scalar> narrow(heads, window, scale, inputs, log_sum_exp, grad_out, delta, gradients);
  if (narrow.suits()) return narrow.backward(work);
  wide_window_backward(work, heads, window, scale, inputs, log_sum_exp, grad_out, delta, gradients);
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
