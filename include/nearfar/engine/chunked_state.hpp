#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/engine/microkernel.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
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
// the roles exchanged. Rows of keys and values are padded with zeros to whole vectors; queries lie on the vector lanes
// (d x chunk_tokens), so that scores need no sums across lanes.

/// Tokens a chunk: twice as many would spend more on the pairs within a chunk than they save on states.
inline constexpr Index chunk_tokens = 64;

/// Spreads the steps of a lookahead over the inner steps of products.
NEARFAR_INLINE auto pace(Lookahead& ahead) {
  return [&ahead](Index k) {
    if (k % 3 == 0) ahead.step();
  };
}

/// Sums over all tokens so far: running = past + local, where `past` was summed before the segment of tokens at hand
/// and `local` within it. A segment's own sum is thus the same whether or not its past was known when it was taken, and
/// the result is the same whether segments are taken in turn or all at once.
template <class T>
struct RunningSums {
  const T* past;
  T* local;
  T* running;

  RunningSums from(Index offset) const { return {past + offset, local + offset, running + offset}; }

  NEARFAR_INLINE void add(Index at, const Packet<T>& sum) const {
    const Packet<T> updated = padd(ploadu<Packet<T>>(local + at), sum);
    pstoreu(local + at, updated);
    pstoreu(running + at, padd(ploadu<Packet<T>>(running + at), sum));
  }

  /// Adds sum_j key_j^T value_j (dim x cols) over `count` tokens.
  void add_products(const T* key, Index key_stride, Index dim, const T* value, Index cols, Index count,
                    Lookahead& ahead) const {
    for_each_panel<T>(cols, [&](auto vectors, Index c) {
      multiply<decltype(vectors)::value>(
          Broadcast<T>{key, 1, key_stride}, dim, value + c, cols, count,
          [](Index, int) { return pset1<Packet<T>>(T(0)); },
          [&](Index a, int v, const Packet<T>& sum) { add(a * cols + c + v * lanes<T>, sum); }, pace(ahead));
    });
  }

  /// Adds sum_j weight_j row_j (1 x cols) over `count` tokens; no weights mean 1.
  void add_rows(const T* row, Index cols, const T* weight, Index count) const {
    for (Index c = 0; c < cols; c += lanes<T>) {
      Packet<T> sum = pset1<Packet<T>>(T(0));
      for (Index j = 0; j < count; ++j) {
        const Packet<T> entries = ploadu<Packet<T>>(row + j * cols + c);
        sum = weight == nullptr ? padd(sum, entries) : pmadd(pset1<Packet<T>>(weight[j]), entries, sum);
      }
      add(c, sum);
    }
  }
};

/// scores[j][i] = query_i . key_j where j <= i, else 0, for `keys` rows of keys with row stride `key_stride` and
/// `queries` queries on lanes. What stands in later keys reaches no earlier query, not even NaN. Adds each query's
/// scores up to row_sum[i] unless that is null.
template <class T>
void chunk_scores(const T* query, Index queries, const T* key, Index key_stride, Index keys, Index dim, T* scores,
                  T* row_sum, Lookahead& ahead) {
  for_each_panel<T>(round_up(queries, lanes<T>), [&](auto vectors, Index i) {
    constexpr int count = decltype(vectors)::value;
    Packet<T> sum[count];
    NEARFAR_UNROLL for (int v = 0; v < count; ++v) sum[v] = pset1<Packet<T>>(T(0));
    multiply<count>(
        Broadcast<T>{key, key_stride, 1}, std::min(keys, i + count * lanes<T>), query + i, chunk_tokens, dim,
        [](Index, int) { return pset1<Packet<T>>(T(0)); },
        [&](Index j, int v, const Packet<T>& product) {
          const Index first = i + v * lanes<T>;
          const Packet<T> zero = pset1<Packet<T>>(T(0));
          const Packet<T> earlier = pcmp_lt(plset<Packet<T>>(T(first)), pset1<Packet<T>>(T(j)));
          const Packet<T> score = j <= first ? product : pselect(earlier, zero, product);
          sum[v] = padd(sum[v], score);
          pstoreu(scores + j * chunk_tokens + first, score);
        },
        pace(ahead));
    if (row_sum == nullptr) return;
    for (int v = 0; v < count; ++v) {
      T* at = row_sum + i + v * lanes<T>;
      pstoreu(at, padd(ploadu<Packet<T>>(at), sum[v]));
    }
  });
}

/// row_sum[i] = query_i . key_sum: what all earlier keys contribute to the row sums.
template <class T>
void past_row_sums(const T* query, Index queries, const T* key_sum, Index dim, T* row_sum) {
  for_each_panel<T>(round_up(queries, lanes<T>), [&](auto vectors, Index i) {
    multiply<decltype(vectors)::value>(
        Broadcast<T>{key_sum, 0, 1}, 1, query + i, chunk_tokens, dim, [](Index, int) { return pset1<Packet<T>>(T(0)); },
        [&](Index, int v, const Packet<T>& sum) { pstoreu(row_sum + i + v * lanes<T>, sum); });
  });
}

/// out_i = query_i state + sum_{j <= i} scores[j][i] value_j, or `add` that to out_i, for `queries` rows of `cols`
/// columns; `keys` of them have a key and value beside them in the chunk.
template <class T>
void chunk_attend(const T* query, Index queries, Index dim, const T* state, const T* scores, const T* value, Index keys,
                  T* out, Index cols, bool add, Lookahead& ahead) {
  for_each_panel<T>(cols, [&](auto vectors, Index column) {
    constexpr int width = decltype(vectors)::value;
    for_each_tile<width>(queries, [&](auto tile, Index first) {
      constexpr int count = decltype(tile)::value;
      Packet<T> c[count][width];
      NEARFAR_UNROLL for (int r = 0; r < count; ++r) {
        NEARFAR_UNROLL for (int v = 0; v < width; ++v) {
          c[r][v] = add ? ploadu<Packet<T>>(out + (first + r) * cols + column + v * lanes<T>) : pset1<Packet<T>>(T(0));
        }
      }
      multiply_add(c, Broadcast<T>{query + first, 1, chunk_tokens}, state + column, cols, dim, pace(ahead));
      // Keys before the tile are seen by all of its queries, those beside it by the queries from their own on.
      multiply_add(c, Broadcast<T>{scores + first, 1, chunk_tokens}, value + column, cols, std::min(first, keys));
      NEARFAR_UNROLL for (int j = 0; j < count; ++j) {
        if (first + j >= keys) break;
        const T* score = scores + (first + j) * chunk_tokens + first;
        const T* row = value + (first + j) * cols + column;
        NEARFAR_UNROLL for (int r = j; r < count; ++r) {
          NEARFAR_UNROLL for (int v = 0; v < width; ++v) {
            c[r][v] = pmadd(pset1<Packet<T>>(score[r]), ploadu<Packet<T>>(row + v * lanes<T>), c[r][v]);
          }
        }
      }
      NEARFAR_UNROLL for (int r = 0; r < count; ++r) {
        NEARFAR_UNROLL for (int v = 0; v < width; ++v) {
          pstoreu(out + (first + r) * cols + column + v * lanes<T>, c[r][v]);
        }
      }
    });
  });
}

/// out_i += scale_i (past + sum_{j <= i} weight_j row_j): running sums of rows, which pass on the gradient of a row
/// sum. `past` (1 x cols) is overwritten; no scale and no weights mean 1.
template <class T>
void chunk_add_prefix_sums(T* past, const T* row, const T* weight, Index rows, const T* scale, Index queries, T* out,
                           Index cols) {
  for (Index i = 0; i < queries; ++i) {
    const Packet<T> w = pset1<Packet<T>>(weight == nullptr || i >= rows ? T(1) : weight[i]);
    const Packet<T> s = pset1<Packet<T>>(scale == nullptr ? T(1) : scale[i]);
    for (Index c = 0; c < cols; c += lanes<T>) {
      Packet<T> sum = ploadu<Packet<T>>(past + c);
      if (i < rows) {
        sum = pmadd(w, ploadu<Packet<T>>(row + i * cols + c), sum);
        pstoreu(past + c, sum);
      }
      pstoreu(out + i * cols + c, pmadd(s, sum, ploadu<Packet<T>>(out + i * cols + c)));
    }
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
