#pragma once

#include <nearfar/detail/function_ref.hpp>
#include <nearfar/detail/lookahead.hpp>
#include <nearfar/detail/scratch.hpp>
#include <nearfar/mask.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// Softmax pooling: every head takes a softmax over the rows x_i that it is shown and keeps their weighted mean,
//
//   score_ih  = w_h . x_i                                  (in units of log 2: w holds the scale and log2 e)
//   weight_ih = 2^(score_ih - max_h) / sum_h               sum_h = sum_i 2^(score_ih - max_h)
//   mean_h    = sum_i weight_ih x_i[columns of head h]
//
// where w_h (a row of `weights`) may look at all columns of x. Rows come in any order and number; two poolings merge.

/// Scores are taken for this many heads and rows at a time, features on the vector lanes: all sums stay in registers,
/// and few heads would leave vectors of heads half empty.
inline constexpr int head_block = vector_registers >= 32 ? 8 : 4;
inline constexpr int row_block = 3;

/// So many rows are scored before their weighted sums are taken: these are then read and written once for all of them,
/// and the rows are still in the cache.
inline constexpr Index pool_rows = 2 * row_block;

/// While scores are taken, the caller's lookahead takes a step every so many columns.
template <class T>
inline constexpr Index fetch_columns = 4 * cache_line / Index{sizeof(T)};

/// The heads of a pooling. Heads share the columns of a row in groups, as query heads share a key head.
struct PoolingShape {
  Index heads = 0;
  Index dim = 0;
  Index group = 1;
  bool per_head_weights = false;  ///< whether a head's score sees its own columns alone: no other weights are read

  Index cols() const { return heads / group * dim; }
  Index column(Index head) const { return group == 1 ? head * dim : head / group * dim; }

  /// The means of all heads, side by side.
  Index width() const { return heads * dim; }

  /// Scores and weights of a row are padded to whole blocks of heads; the weights of padding are zero.
  Index padded() const { return round_up(heads, head_block); }

  /// The same for scores alone, which need not know where heads end if they see all columns: heads whose columns fill
  /// no whole vectors stand as one.
  template <class T>
  PoolingShape of_scores() const {
    return per_head_weights || dim % lanes<T> == 0 ? *this : PoolingShape{heads, cols(), heads};
  }

  /// Room for the scores of `rows` rows, rounded up to whole blocks, and for the vector that runs over their end.
  template <class T>
  Index scores(Index rows) const {
    return round_up(round_up(rows, row_block) * padded(), lanes<T>);
  }

  /// How often a pooling of `rows` rows fetches.
  template <class T>
  Index fetches(Index rows) const {
    const Index scores = per_head_weights ? heads * ceil_div(dim, fetch_columns<T>)
                                          : ceil_div(heads, head_block) * ceil_div(cols(), fetch_columns<T>);
    return ceil_div(rows, row_block) * scores + ceil_div(rows, pool_rows) * heads;
  }
};

/// Where a pooling stands: of each head the maximum of the scores (-infinity before any row), and with weights
/// 2^(score - max) their sum and the sum of the weighted rows.
template <class T>
struct SoftmaxPool {
  T* max;    // padded heads
  T* sum;    // padded heads
  T* total;  // heads x dim

  static Index size(const PoolingShape& shape) { return 2 * shape.padded() + shape.width(); }

  static SoftmaxPool at(T* memory, const PoolingShape& shape) {
    return {memory, memory + shape.padded(), memory + 2 * shape.padded()};
  }

  void start(const PoolingShape& shape) const {
    std::fill_n(max, shape.padded(), -infinity<T>);
    std::fill_n(sum, shape.padded(), T(0));
    std::fill_n(total, shape.width(), T(0));
  }

  void copy_from(const SoftmaxPool& other, const PoolingShape& shape) const {
    std::copy_n(other.max, size(shape), max);
  }

  /// Joins a pooling of other rows, both sums taken at the larger maximum.
  void merge(const SoftmaxPool& other, const PoolingShape& shape) const {
    for (Index h = 0; h < shape.heads; ++h) {
      const Index first = h * shape.dim;
      merge_triples(max[h], sum[h], total + first, other.max[h], other.sum[h], other.total + first, shape.dim);
    }
  }

  /// The weighted means; zero where no row was shown.
  void means(const PoolingShape& shape, T* to) const {
    for (Index h = 0; h < shape.heads; ++h) {
      for (Index c = h * shape.dim; c < (h + 1) * shape.dim; ++c) to[c] = sum[h] == T(0) ? T(0) : total[c] / sum[h];
    }
  }
};

/// Vectors of heads: no wider than a block.
template <class T>
using HeadPacket = typename Eigen::internal::find_best_packet<T, head_block>::type;

/// 2^x of `count` numbers in place; up to the next multiple of lanes<T> the array is written too.
template <class T>
void exp2_in_place(T* x, Index count) {
  for (Index i = 0; i < count; i += lanes<T>) pstoreu(x + i, exp2<T>(ploadu<Packet<T>>(x + i)));
}

/// How score_block wants weights: those of each block of heads side by side, vector by vector (then number by number,
/// in the columns that fill no vector), so that one pointer walks them. Heads that see their own columns alone need
/// nothing of the kind. take(count) gives room for so many numbers.
template <class T>
const T* interleave(const PoolingShape& shape, const T* weights, FunctionRef<T*(Index)> take) {
  if (shape.per_head_weights) return weights;
  const Index cols = shape.cols();
  const Index in_vectors = cols / lanes<T> * lanes<T>;
  T* const interleaved = take(shape.padded() * cols);
  T* to = interleaved;
  for (Index first = 0; first < shape.padded(); first += head_block) {
    for (Index c = 0, width; c < cols; c += width) {
      width = c < in_vectors ? lanes<T> : 1;
      for (Index h = first; h < first + head_block; ++h) to = std::copy_n(weights + h * cols + c, width, to);
    }
  }
  return interleaved;
}

/// scores(r, h) = weights(h) . x[r] over `cols` columns, those of x from `column` on, for `Heads` heads at once.
template <int Heads, class T>
NEARFAR_INLINE void score_block(const T* const (&x)[row_block], Index column, const T* weights, Index cols, T* scores,
                                Index padded, Spread& fetch) {
  Packet<T> sum[row_block][Heads];
  const T* row[row_block];
  NEARFAR_UNROLL for (int r = 0; r < row_block; ++r) {
    row[r] = x[r] + column;
    NEARFAR_UNROLL for (int h = 0; h < Heads; ++h) sum[r][h] = pset1<Packet<T>>(T(0));
  }
  const Index in_vectors = cols / lanes<T> * lanes<T>;
  Index c = 0;
  while (c < in_vectors) {
    fetch();
    for (const Index end = std::min(c + fetch_columns<T>, in_vectors); c < end; c += lanes<T>) {
      Packet<T> packet[row_block];
      NEARFAR_UNROLL for (int r = 0; r < row_block; ++r) packet[r] = load_once<Packet<T>>(row[r] + c);
      NEARFAR_UNROLL for (int h = 0; h < Heads; ++h, weights += lanes<T>) {
        const Packet<T> w = load_once<Packet<T>>(weights);
        NEARFAR_UNROLL for (int r = 0; r < row_block; ++r) sum[r][h] = pmadd(packet[r], w, sum[r][h]);
      }
    }
  }
  NEARFAR_UNROLL for (int r = 0; r < row_block; ++r) sum_vectors(sum[r], scores + r * padded);
  for (int r = 0; r < row_block && c < cols; ++r) {
    for_each_packet<T>(Heads, [&, to = scores + r * padded](auto by, Index h) {
      using P = typename decltype(by)::template Of<T>;
      P score = ploadu<P>(to + h);
      for (Index k = c; k < cols; ++k) {
        score = pmadd(pset1<P>(row[r][k]), ploadu<P>(weights + (k - c) * Heads + h), score);
      }
      pstoreu(to + h, score);
    });
  }
}

/// Calls visit(heads, first_head, first_column, columns) for blocks of heads, `heads` an integral constant, and the
/// columns that their scores see: blocks of heads that see all columns, or single heads that see their own.
template <class Visit>
NEARFAR_INLINE void for_each_head_block(const PoolingShape& shape, Visit&& visit) {
  if (shape.per_head_weights) {
    for (Index h = 0; h < shape.heads; ++h) visit(std::integral_constant<int, 1>{}, h, shape.column(h), shape.dim);
  } else {
    for (Index h = 0; h < shape.heads; h += head_block) {
      visit(std::integral_constant<int, head_block>{}, h, Index{0}, shape.cols());
    }
  }
}

/// scores(r, h) = w_h . rows[r], with interleaved weights.
template <class T>
NEARFAR_INLINE void score_rows(const PoolingShape& shape, const T* weights, const T* const (&rows)[row_block],
                               T* scores, Spread& fetch) {
  for_each_head_block(shape, [&](auto together, Index h, Index column, Index cols) {
    score_block<decltype(together)::value>(rows, column, weights + h * shape.cols() + column, cols, scores + h,
                                           shape.padded(), fetch);
  });
}

/// Takes the scores of `count` rows into max and sum. weights gets 2^(score - max), and keep what the old sums keep of
/// themselves, 2^(old max - max).
template <class T>
void weigh_rows(const PoolingShape& shape, const T* scores, Index count, const SoftmaxPool<T>& state, T* weights,
                T* keep) {
  using P = HeadPacket<T>;
  const Index padded = shape.padded();
  const Index end = count * padded;
  for (Index h = 0; h < padded; h += Eigen::internal::unpacket_traits<P>::size) {
    const P old = ploadu<P>(state.max + h);
    P max = old;
    for (Index at = h; at < end; at += padded) max = pmax(max, ploadu<P>(scores + at));
    pstoreu(state.max + h, max);
    const P shift = shift_of(max);
    for (Index at = h; at < end; at += padded) pstoreu(weights + at, psub(ploadu<P>(scores + at), shift));
    pstoreu(keep + h, psub(old, shift));
  }
  exp2_in_place(weights, end);
  exp2_in_place(keep, padded);
  for (Index h = 0; h < padded; h += Eigen::internal::unpacket_traits<P>::size) {
    P sum = pmul(ploadu<P>(keep + h), ploadu<P>(state.sum + h));
    for (Index at = h; at < end; at += padded) sum = padd(sum, ploadu<P>(weights + at));
    pstoreu(state.sum + h, sum);
  }
}

/// total_h = keep_h total_h + sum_r weight_rh rows[r], the sums of a head of 64 columns all in registers.
template <class T>
void add_weighted_rows(const PoolingShape& shape, const T* const* rows, Index count, const T* weights, const T* keep,
                       T* total, Spread& fetch) {
  for (Index h = 0; h < shape.heads; ++h) {
    fetch();
    const Index column = shape.column(h);
    for_each_column_block<std::clamp(64 / lanes<T>, 4, 8), T>(shape.dim, [&](auto by, auto packets, Index c) {
      using P = typename decltype(by)::template Of<T>;
      constexpr Index step = Index{sizeof(P) / sizeof(T)};
      constexpr int several = decltype(packets)::value;
      T* const to = total + h * shape.dim + c;
      P sum[several];
      NEARFAR_UNROLL for (int p = 0; p < several; ++p) sum[p] = pmul(pset1<P>(keep[h]), ploadu<P>(to + p * step));
      for (Index r = 0; r < count; ++r) {
        const P weight = pset1<P>(weights[r * shape.padded() + h]);
        const T* const row = rows[r] + column + c;
        NEARFAR_UNROLL for (int p = 0; p < several; ++p) sum[p] = pmadd(weight, ploadu<P>(row + p * step), sum[p]);
      }
      NEARFAR_UNROLL for (int p = 0; p < several; ++p) pstoreu(to + p * step, sum[p]);
    });
  }
}

/// Shows `count` rows to the pooling, with interleaved weights. row(i) gives row i, asked for once and in turn; it must
/// stay until the next pool_rows are asked for. `scores` (shape.scores(count) numbers) is left holding the scores.
/// Meanwhile fetches, shape.fetches(count) times.
template <class T>
void pool(const PoolingShape& shape, const T* weights, Index count, FunctionRef<const T*(Index)> row, T* scores,
          const SoftmaxPool<T>& state, Spread& fetch, Scratch& scratch) {
  const Scratch::Scope scope(scratch);
  const Index padded = shape.padded();
  T* const row_weights = scratch.take<T>(shape.scores<T>(pool_rows));
  T* const keep = scratch.take<T>(shape.scores<T>(1));
  // Rows of zeros fill up the last block.
  T* const zeros = scratch.take<T>(shape.cols());
  std::fill_n(zeros, shape.cols(), T(0));
  for (Index begin = 0; begin < count; begin += pool_rows) {
    const Index shown = std::min(pool_rows, count - begin);
    const T* rows[pool_rows];
    for (Index first = 0; first < shown; first += row_block) {
      const T* block[row_block];
      for (Index r = 0; r < row_block; ++r) {
        rows[first + r] = block[r] = first + r < shown ? row(begin + first + r) : zeros;
      }
      score_rows(shape, weights, block, scores + (begin + first) * padded, fetch);
    }
    weigh_rows(shape, scores + begin * padded, shown, state, row_weights, keep);
    add_weighted_rows(shape, rows, shown, row_weights, keep, state.total, fetch);
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
