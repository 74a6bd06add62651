#pragma once

#include <nearfar/detail/tiles.hpp>
#include <nearfar/engine/fresh_gradients.hpp>
#include <nearfar/engine/gradient_tile.hpp>
#include <nearfar/engine/narrow_gradient.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// delta_i = grad_out_i . out_i of each head (heads.query x n_q): what the softmax of a row takes off every gradient of
/// its scores.
template <class Scalar, class T>
void softmax_delta(Work& work, const Heads& heads, Tokens<const Scalar> out, Tokens<const Scalar> grad_out, T* delta) {
  constexpr Index rows = 1024;
  const Index width = heads.value_width();
  work.for_each((out.rows() + rows - 1) / rows, [&](Index task, Scratch&) {
    for (Index i = task * rows; i < std::min((task + 1) * rows, out.rows()); ++i) {
      for (Index h = 0; h < heads.query; ++h) {
        const auto features = [&](const auto& tokens) {
          return tokens.matrix().row(i).segment(h * width, width).array().template cast<T>();
        };
        delta[h * out.rows() + i] = (features(out) * features(grad_out)).sum();
      }
    }
  });
}

/// The backward pass of window_attention: gradients of query, key and value from the saved log-sum-exp and delta, both
/// heads.query x n_q.
///
/// A task is one key/value head of one segment of the keys of a sequence: it alone writes their gradients, and walks
/// over the queries that see them. Where a sequence has several segments, the gradients of its queries are summed over
/// them in order, each further segment having rows of its own for the queries that see it. How many there are depends
/// on the shapes alone. Work 2.5 times the forward pass.
template <class Scalar>
void wide_window_gradient(Work& work, const Heads& heads, Window window, double scale, const Inputs<Scalar>& inputs,
                          const double* log_sum_exp, Tokens<const Scalar> grad_out, const Accumulator<Scalar>* delta,
                          const InputGradients<Scalar>& gradients) {
  using T = Accumulator<Scalar>;
  constexpr Index capacity = GradientTile<T>::capacity;
  constexpr Index enough_tasks = 16;
  constexpr Index shortest_segment = 512;
  // With more of them, queries and their weights would crowd what is fetched ahead out of the second-level cache.
  constexpr Index keys_a_visit = 64;
  const Index dim = heads.dim;
  const Index value_dim = heads.value_width();
  const Index queries = inputs.query.rows();
  const Index sequences = sequence_count(inputs);
  if (sequences == 0) return;
  const Index segments = std::clamp<Index>(inputs.key.rows() / (sequences * shortest_segment), 1,
                                           std::max<Index>(enough_tasks / (sequences * heads.key_value), 1));

  // The keys [first, end) of segment s of a sequence, and the queries that see one of them.
  const auto segment = [&](const Sequence& rows, Index s) {
    return Range{rows.key_count * s / segments, rows.key_count * (s + 1) / segments};
  };
  const auto seeing = [&](const Sequence& rows, const Band& band, Range keys) {
    if (keys.count() == 0) return Range{};
    return Range{std::clamp<Index>(band.seeing(keys.first).first, 0, rows.query_count),
                 std::clamp<Index>(band.seeing(keys.end - 1).end, 0, rows.query_count)};
  };
  // Where the rows of each segment of each sequence begin.
  Index* const first_row = work.take<Index>(sequences * segments);
  Index partial_rows = 0;
  for (Index b = 0; b < sequences; ++b) {
    const Sequence rows = sequence(inputs, b);
    const Band band(window, rows.query_count, rows.key_count);
    for (Index s = 1; s < segments; ++s) {
      first_row[b * segments + s] = partial_rows;
      partial_rows += seeing(rows, band, segment(rows, s)).count();
    }
  }
  Scalar* const partial = work.take<Scalar>(partial_rows * heads.query_cols());
  // Of the queries that see segment s of sequence b.
  const auto grad_query = [&](Index b, Index s, Range queries_seeing) {
    if (s == 0) {
      return gradients.query.middle_rows(sequence(inputs, b).query_begin + queries_seeing.first,
                                         queries_seeing.count());
    }
    return Tokens<Scalar>(partial + first_row[b * segments + s] * heads.query_cols(), queries_seeing.count(),
                          heads.query_cols(), heads.query_cols());
  };

  work.for_each(sequences * segments * heads.key_value, [&](Index task, Scratch& scratch) {
    const Index key_head = task % heads.key_value;
    const Index s = task / heads.key_value % segments;
    const Index b = task / heads.key_value / segments;
    const Sequence rows = sequence(inputs, b);
    const Band band(window, rows.query_count, rows.key_count);
    const std::uint8_t* mask = key_mask(inputs, rows);
    const Range own = segment(rows, s);
    const Range queries_seeing = seeing(rows, band, own);

    const Tokens key = inputs.key.middle_rows(rows.key_begin, rows.key_count).middle_cols(key_head * dim, dim);
    const Tokens value =
        inputs.value.middle_rows(rows.key_begin, rows.key_count).middle_cols(key_head * value_dim, value_dim);
    const Tokens grad_key = gradients.key.middle_rows(rows.key_begin, rows.key_count).middle_cols(key_head * dim, dim);
    const Tokens grad_value =
        gradients.value.middle_rows(rows.key_begin, rows.key_count).middle_cols(key_head * value_dim, value_dim);

    GradientTile<T> tile(scratch, dim, value_dim);
    KeyTile<T> keys(scratch, dim, value_dim);
    const auto grad_key_row = [&](Index j) { return grad_key.row(keys.position(j)); };
    const auto grad_value_row = [&](Index j) { return grad_value.row(keys.position(j)); };
    FreshGradients<Scalar> fresh(grad_key, grad_value, own);
    for (Index h = key_head * heads.group(); h < (key_head + 1) * heads.group(); ++h) {
      const Tokens to = grad_query(b, s, queries_seeing).middle_cols(h * dim, dim);
      if (s == 0) {
        const Tokens all = gradients.query.middle_rows(rows.query_begin, rows.query_count).middle_cols(h * dim, dim);
        all.middle_rows(0, queries_seeing.first).matrix().setZero();
        all.middle_rows(queries_seeing.end, rows.query_count - queries_seeing.end).matrix().setZero();
      }
      for (Index i = queries_seeing.first; i < queries_seeing.end; i += capacity) {
        const Index count = std::min(capacity, queries_seeing.end - i);
        const Index row = rows.query_begin + i;
        const Tokens query = inputs.query.middle_cols(h * dim, dim);
        const Tokens grad = grad_out.middle_cols(h * value_dim, value_dim);
        tile.load(query.middle_rows(row, count), grad.middle_rows(row, count), i, log_sum_exp + h * queries + row,
                  delta + h * queries + row, T(scale));
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
          const Index queries_ahead = std::min(capacity, queries_seeing.end - next);
          if (j == end) ahead.add(to.middle_rows(i - queries_seeing.first, count));
          if (j == end && queries_ahead > 0) {
            announce_keys(std::max(band.first(next), own.first), own.end);
            ahead.add(query.middle_rows(row + count, queries_ahead));
            ahead.add(grad.middle_rows(row + count, queries_ahead));
          }
          tile.visit(keys, band, written, grad_key_row, grad_value_row);
          keys.clear();
        }
        tile.finish(to.middle_rows(i - queries_seeing.first, count));
      }
    }
    fresh.finish();
  });
  if (segments == 1) return;

  constexpr Index block = 256;
  const Tiles tiles(work, inputs, block);
  work.for_each(tiles.count(), [&](Index task, Scratch&) {
    const Tile tile = tiles[task];
    const Sequence rows = sequence(inputs, tile.sequence);
    const Band band(window, rows.query_count, rows.key_count);
    for (Index s = 1; s < segments; ++s) {
      const Range part = seeing(rows, band, segment(rows, s));
      const Index first = std::max(part.first, tile.first);
      const Index count = std::min(part.end, tile.first + tile.count) - first;
      if (count <= 0) continue;
      gradients.query.middle_rows(rows.query_begin + first, count).matrix() +=
          grad_query(tile.sequence, s, part).middle_rows(first - part.first, count).matrix();
    }
  });
}

/// As above, by the way that suits the window. Where it is never narrow, the other alone compiles less.
template <class Scalar>
void window_gradient(Work& work, const Heads& heads, Window window, double scale, const Inputs<Scalar>& inputs,
                     const double* log_sum_exp, Tokens<const Scalar> grad_out, const Accumulator<Scalar>* delta,
                     const InputGradients<Scalar>& gradients) {
  const NarrowGradient<Scalar> narrow(heads, window, scale, inputs, log_sum_exp, grad_out, delta, gradients);
  if (narrow.suits()) return narrow.differentiate(work);
  wide_window_gradient(work, heads, window, scale, inputs, log_sum_exp, grad_out, delta, gradients);
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
