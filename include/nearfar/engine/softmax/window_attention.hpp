#pragma once

#include <nearfar/engine/softmax/few_queries.hpp>
#include <nearfar/engine/softmax/narrow_window.hpp>
#include <nearfar/engine/softmax/query_tile.hpp>
#include <nearfar/engine/tiles.hpp>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The form of window_attention for many queries and windows that are not narrow.
///
/// A task is one head of one tile of queries; it walks over the keys that some query of the tile sees, at most
/// KeyTile::capacity at a time. Work n_q * (keys seen) * (dim + value_dim) a head, memory a tile a thread.
template <class Scalar>
void window_attention_in_tiles(Work& work, const Heads& heads, Window window, double scale,
                               const Inputs<Scalar>& inputs, Tokens<Scalar> out, double* log_sum_exp,
                               Tokens<const Accumulator<Scalar>> factors) {
  using T = Accumulator<Scalar>;
  const Index dim = heads.dim;
  const Index value_dim = heads.value_width();
  const Tiles tiles(work, inputs, 576);
  // Causal work grows along a sequence: the last tiles come first, so that no long task is left for the end.
  work.for_each(tiles.count() * heads.query, [&](Index task, Scratch& scratch) {
    const Tile tile = tiles[tiles.count() - 1 - task / heads.query];
    const Index head = task % heads.query;
    const Index key_head = head / heads.group();
    const Sequence rows = sequence(inputs, tile.sequence);
    const Band band(window, rows.query_count, rows.key_count);
    const std::uint8_t* mask = key_mask(inputs, rows);

    QueryTile<T> queries(scratch, tile.first, tile.count, dim, value_dim);
    KeyTile<T> keys(scratch, dim, value_dim);
    const Tokens query = inputs.query.middle_rows(rows.query_begin + tile.first, tile.count).head(head, dim);
    const Tokens result = out.middle_rows(rows.query_begin + tile.first, tile.count).head(head, value_dim);
    const Tokens key = inputs.key.middle_rows(rows.key_begin, rows.key_count).head(key_head, dim);
    const Tokens value = inputs.value.middle_rows(rows.key_begin, rows.key_count).head(key_head, value_dim);
    Range seen = band.seen_by_any(tile.first, tile.count);
    // Groups of keys begin where panels of queries do: the diagonal of a causal window crosses as few as it can.
    seen.first = seen.first / group_rows * group_rows;
    const auto next_keys = [&] { return std::min(seen.count(), KeyTile<T>::capacity); };

    // How many queries of the tile see keys before `end`, and how many of them no others.
    const auto begun = [&](Index end) {
      return std::clamp<Index>(band.seeing(end - 1).end - tile.first, 0, tile.count);
    };
    const auto ended = [&, last = seen.end](Index end) {
      return end < last ? std::clamp<Index>(band.seeing(end).first - tile.first, 0, tile.count) : tile.count;
    };

    Lookahead later;
    // Tasks are numbered head by head within a tile.
    const Index next_head = work.likely_next(head);
    if (next_head < heads.query) {
      const Index key_heads = next_head / heads.group() - key_head;
      later.add(query.data() + (next_head - head) * dim, query.stride(), begun(seen.first + next_keys()), dim);
      later.add(key.row(seen.first) + key_heads * dim, key.stride(), next_keys(), dim);
      later.add(value.row(seen.first) + key_heads * value_dim, value.stride(), next_keys(), value_dim);
    }
    Lookahead& ahead = queries.lookahead();
    ahead.and_then(&later);
    with_store(columns_past_caches(out, value_dim), [&](KeepOrPastCaches store) {
      const auto load_until = [&](Index end) {
        queries.load_until(end, query.data(), query.stride(), log2_scale<T>(scale));
      };
      const auto finish_until = [&](Index end) {
        queries.finish_until(
            end, result.data(), result.stride(),
            log_sum_exp == nullptr ? nullptr : log_sum_exp + head * inputs.query.rows() + rows.query_begin + tile.first,
            factors.rows() == 0 ? nullptr : factors.row(head), store);
      };
      while (seen.count() > 0) {
        seen.first = keys.take(key, value, mask, seen);
        load_until(begun(seen.first));
        const Range joining{queries.loaded(), begun(seen.first + next_keys())};
        const Range leaving{queries.finished(), ended(seen.first)};
        ahead.clear();
        ahead.add(key.middle_rows(seen.first, next_keys()));
        ahead.add(value.middle_rows(seen.first, next_keys()));
        ahead.add(query.middle_rows(joining.first, joining.count()));
        if (!store.past) ahead.add(result.middle_rows(leaving.first, leaving.count()));
        queries.visit(keys, band);
        keys.clear();
        finish_until(leaving.end);
      }
      // Queries that see no key.
      load_until(tile.count);
      finish_until(tile.count);
    });
  });
}

/// As window_attention, by the way that suits the number of queries. For windows that are never narrow: others compile
/// more.
template <class Scalar>
void wide_window_attention(Work& work, const Heads& heads, Window window, double scale, const Inputs<Scalar>& inputs,
                           Tokens<Scalar> out, double* log_sum_exp) {
  const FewQueries<Scalar> few(heads, window, scale, inputs, {});
  if (few.suits()) return few.attend(work, out, log_sum_exp);
  window_attention_in_tiles(work, heads, window, scale, inputs, out, log_sum_exp, {});
}

/// Softmax attention of every head over the keys that a window shows: the whole of Softmax and of Banded, which differ
/// in the window alone. Writes out, and the log-sum-exp (heads.query x n_q) where it is not null. `factors`
/// (heads.query x value_dim) multiply each head and feature of out, unless there are none. By the way that suits the
/// window and the number of queries.
template <class Scalar>
void window_attention(Work& work, const Heads& heads, Window window, double scale, const Inputs<Scalar>& inputs,
                      Tokens<Scalar> out, double* log_sum_exp, Tokens<const Accumulator<Scalar>> factors = {}) {
  const FewQueries<Scalar> few(heads, window, scale, inputs, factors);
  if (few.suits()) return few.attend(work, out, log_sum_exp);
  const NarrowWindow<Scalar> narrow(heads, window, scale, inputs, factors);
  if (narrow.suits()) return narrow.attend(work, out, log_sum_exp);
  window_attention_in_tiles(work, heads, window, scale, inputs, out, log_sum_exp, factors);
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
