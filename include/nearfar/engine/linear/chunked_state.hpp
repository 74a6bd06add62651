#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/engine/microkernel.hpp>

#include <algorithm>
#include <numeric>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// Attention without a softmax is a sum that can be taken in any order. All keys before a chunk of tokens are summed up
// in one matrix, the state S = sum_j key_j^T value_j (d x d_v), and a causal chunk needs only
//
//   out_i = query_i S + sum_{j <= i within the chunk} (query_i . key_j) value_j,
//   S += sum_{j within the chunk} key_j^T value_j.
//
// This file has these products for one chunk. "Query", "key" and "value" are roles: gradients are the same sum with
// the roles exchanged. Queries lie on the vector lanes, so that scores need no sums across lanes.

/// Rows that a product takes at once. Chunks are whole groups of them, and states are filled up to such: one register
/// tile for each panel of columns, whatever the number of tokens and features. What stands in the rows that fill up
/// reaches no others.
inline constexpr int state_rows = tile_rows<2>;

/// Tokens a chunk: twice as many would spend more on the pairs within a chunk than they save on states.
inline constexpr Index chunk_tokens = [] {
  constexpr Index step = std::lcm(Index{state_rows}, Index{lanes<float>});
  return (64 + step / 2) / step * step;
}();

/// Rows of one head, side by side, padded with zeros to whole vectors.
template <class T>
struct PaddedRows {
  T* data;
  Index dim;
  Index stride = round_up(dim, lanes<T>);

  T* row(Index i) const { return data + i * stride; }

  /// To be read number by number, row by row or feature by feature.
  Broadcast<T> rows() const { return {data, stride, 1}; }
  Broadcast<T> features() const { return {data, 1, stride}; }
};

/// Rows of one head on the vector lanes: dim x chunk_tokens, of which the first `count` columns are in use.
template <class T>
struct LaneRows {
  T* data;
  Index dim;
  Index count;

  Broadcast<T> rows() const { return {data, 1, chunk_tokens}; }
};

/// Sums over all tokens so far: `local` within the segment of tokens at hand, and `running`, which began with what came
/// before it, or null where only the segment's own sum is wanted. That sum is thus the same whether or not its past was
/// known when it was taken, and the result the same whether segments are taken in turn or all at once.
template <class T>
struct RunningSums {
  T* local;
  T* running;
  bool grows;  ///< whether `running` is read again, after what is added now

  RunningSums from(Index offset) const {
    return {local + offset, running == nullptr ? nullptr : running + offset, grows};
  }

  NEARFAR_INLINE void add(Index at, const Packet<T>& sum) const {
    pstoreu(local + at, padd(ploadu<Packet<T>>(local + at), sum));
    if (grows) pstoreu(running + at, padd(ploadu<Packet<T>>(running + at), sum));
  }

  /// Adds sum_j key_j^T value_j (key.dim, in whole groups, x value.stride) over `count` tokens.
  void add_products(const PaddedRows<T>& key, const PaddedRows<T>& value, Index count, Pace<Lookahead> fetch) const {
    // Bidirectional sums are complete before the chunks of the queries, which add nothing.
    if (count == 0) return;
    for_each_panel<T>(value.stride, [&](auto vectors, Index c) {
      // By value: what a reference reads would be read again after each store, which might have changed it.
      multiply_groups<state_rows, decltype(vectors)::value>(
          key.features(), key.dim, value.data + c, value.stride, count,
          [](Index, int) { return pset1<Packet<T>>(T(0)); },
          [sums = from(c), stride = value.stride](Index a, int v, const Packet<T>& sum) {
            sums.add(a * stride + v * lanes<T>, sum);
          },
          fetch);
    });
  }

  /// Adds sum_j weight_j row_j (1 x rows.stride) over `count` tokens; no weights mean 1.
  void add_rows(const PaddedRows<T>& rows, const T* weight, Index count) const {
    constexpr Index chains = 4;
    for (Index c = 0; c < rows.stride; c += lanes<T>) {
      Packet<T> sum[chains];
      NEARFAR_UNROLL for (Index i = 0; i < chains; ++i) sum[i] = pset1<Packet<T>>(T(0));
      const auto add_row = [&](Index j, Packet<T>& to) {
        const Packet<T> factor = pset1<Packet<T>>(weight == nullptr ? T(1) : weight[j]);
        to = pmadd(factor, ploadu<Packet<T>>(rows.row(j) + c), to);
      };
      Index j = 0;
      for (; j + chains <= count; j += chains) {
        NEARFAR_UNROLL for (Index i = 0; i < chains; ++i) add_row(j + i, sum[i]);
      }
      for (; j < count; ++j) add_row(j, sum[0]);
      add(c, padd(padd(sum[0], sum[1]), padd(sum[2], sum[3])));
    }
  }
};

/// products[i] = a_i . b_i for `count` rows: the second may all be one, its stride 0.
template <class T>
void dot_rows(const PaddedRows<T>& a, const PaddedRows<T>& b, Index count, T* products) {
  for (Index first = 0; first < count; first += lanes<T>) {
    Packet<T> sum[lanes<T>];
    NEARFAR_UNROLL for (Index i = 0; i < lanes<T>; ++i) sum[i] = pset1<Packet<T>>(T(0));
    for (Index c = 0; c < a.stride; c += lanes<T>) {
      NEARFAR_UNROLL for (Index i = 0; i < lanes<T>; ++i) {
        sum[i] = pmadd(ploadu<Packet<T>>(a.row(first + i) + c), ploadu<Packet<T>>(b.row(first + i) + c), sum[i]);
      }
    }
    pstoreu(products + first, sum_lanes(sum));
  }
}

/// scores[j][i] = query_i . key_j where j <= i, else 0, for the first `keys` keys. What stands in later keys reaches no
/// earlier query, not even NaN. Adds each query's scores up to row_sum[i] unless that is null.
template <class T>
void chunk_scores(const LaneRows<T>& query, const PaddedRows<T>& key, Index keys, T* scores, T* row_sum,
                  Pace<Lookahead> fetch) {
  for_each_panel<T>(round_up(query.count, lanes<T>), [&](auto vectors, Index panel) {
    constexpr int width = decltype(vectors)::value;
    Packet<T> sum[width];
    NEARFAR_UNROLL for (int v = 0; v < width; ++v) sum[v] = pset1<Packet<T>>(T(0));
    // The keys [from, to), in whole groups, meet the queries of the panel from its vector `first` on.
    const auto score = [&]<int first>(std::integral_constant<int, first>, Index from, Index to) {
      const Index lane = panel + first * lanes<T>;
      constexpr bool alone = width - first == 1 && lanes<T> % tile_rows<1> == 0;
      multiply_groups<alone ? tile_rows<1> : state_rows, width - first>(
          key.rows().rows_from(from), to - from, query.data + lane, chunk_tokens, query.dim,
          [](Index, int) { return pset1<Packet<T>>(T(0)); },
          [&](Index r, int v, const Packet<T>& product) {
            const Index j = from + r;
            const Index i = lane + v * lanes<T>;
            // No query sees what fills up the last group.
            const Index seen_from = j < keys ? j : chunk_tokens;
            const Packet<T> hidden = pcmp_lt(plset<Packet<T>>(T(i)), pset1<Packet<T>>(T(seen_from)));
            const Packet<T> shown = seen_from <= i ? product : pselect(hidden, pset1<Packet<T>>(T(0)), product);
            sum[first + v] = padd(sum[first + v], shown);
            pstoreu(scores + j * chunk_tokens + i, shown);
          },
          fetch);
    };
    const auto end = [&](int vectors_seen) {
      return round_up(std::min(keys, panel + vectors_seen * lanes<T>), state_rows);
    };
    score(std::integral_constant<int, 0>{}, 0, end(1));
    if constexpr (width == 2) score(std::integral_constant<int, 1>{}, end(1), end(2));
    if (row_sum == nullptr) return;
    for (int v = 0; v < width; ++v) {
      T* at = row_sum + panel + v * lanes<T>;
      pstoreu(at, padd(ploadu<Packet<T>>(at), sum[v]));
    }
  });
}

/// out_i = query_i state + sum_{j <= i} scores[j][i] value_j for `count` queries of `dim` features, in whole groups, or
/// `add` that to out_i. The first `keys` queries have a key and value beside them in the chunk.
template <class T>
void chunk_attend(Broadcast<T> query, Index dim, Index count, const T* state, const T* scores,
                  const PaddedRows<T>& value, Index keys, const PaddedRows<T>& out, bool add, Pace<Lookahead> fetch) {
  for_each_panel<T>(out.stride, [&](auto vectors, Index column) {
    constexpr int rows = state_rows, width = decltype(vectors)::value;
    const Index stride = out.stride;
    for (Index first = 0; first < count; first += rows) {
      T* const to = out.row(first) + column;
      Packet<T> c[rows][width];
      NEARFAR_UNROLL for (int r = 0; r < rows; ++r) {
        NEARFAR_UNROLL for (int v = 0; v < width; ++v) {
          c[r][v] = add ? ploadu<Packet<T>>(to + r * stride + v * lanes<T>) : pset1<Packet<T>>(T(0));
        }
      }
      multiply_add(c, query.rows_from(first), state + column, out.stride, dim, fetch);
      // Keys before the tile are seen by all of its queries, those beside it by the queries from their own on.
      multiply_add(c, Broadcast<T>{scores + first, 1, chunk_tokens}, value.data + column, value.stride,
                   std::min(first, keys));
      // Every loop to its full length, or clang 14 keeps the tile in memory.
      NEARFAR_UNROLL for (int j = 0; j < rows; ++j) {
        if (first + j >= keys) break;
        const T* score = scores + (first + j) * chunk_tokens + first;
        NEARFAR_UNROLL for (int r = 0; r < rows; ++r) {
          if (r < j) continue;
          NEARFAR_UNROLL for (int v = 0; v < width; ++v) {
            const Packet<T> entries = ploadu<Packet<T>>(value.row(first + j) + column + v * lanes<T>);
            c[r][v] = pmadd(pset1<Packet<T>>(score[r]), entries, c[r][v]);
          }
        }
      }
      NEARFAR_UNROLL for (int r = 0; r < rows; ++r) {
        NEARFAR_UNROLL for (int v = 0; v < width; ++v) pstoreu(to + r * stride + v * lanes<T>, c[r][v]);
      }
    }
  });
}

/// out_i += scale_i (past + sum_{j <= i} weight_j row_j) for `count` rows out: running sums of the first `rows_count`
/// rows, which pass on the gradient of a row sum. `past` is overwritten; no scale and no weights mean 1.
template <class T>
void chunk_add_prefix_sums(T* past, const PaddedRows<T>& rows, const T* weight, Index rows_count, const T* scale,
                           const PaddedRows<T>& out, Index count) {
  for (Index i = 0; i < count; ++i) {
    const bool grows = i < rows_count;
    const Packet<T> w = pset1<Packet<T>>(weight == nullptr || !grows ? T(1) : weight[i]);
    const Packet<T> s = pset1<Packet<T>>(scale == nullptr ? T(1) : scale[i]);
    for (Index c = 0; c < out.stride; c += lanes<T>) {
      Packet<T> sum = ploadu<Packet<T>>(past + c);
      if (grows) {
        sum = pmadd(w, ploadu<Packet<T>>(rows.row(i) + c), sum);
        pstoreu(past + c, sum);
      }
      pstoreu(out.row(i) + c, pmadd(s, sum, ploadu<Packet<T>>(out.row(i) + c)));
    }
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
