#pragma once

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

/// Rows whose scores enter the softmax together.
inline constexpr Index pooling_tile = 4 * row_block;

/// The heads of a pooling. Heads share the columns of a row in groups, as query heads share a key head.
struct PoolingShape {
  Index heads = 0;
  Index dim = 0;
  Index group = 1;
  bool own_columns = false;  ///< whether a head's score sees its own columns alone; other weights are then not read

  Index cols() const { return heads / group * dim; }
  Index column(Index head) const { return head / group * dim; }

  /// The means of all heads, side by side.
  Index width() const { return heads * dim; }

  /// Scores and weights of a row are padded to whole blocks of heads; the weights of padding are zero.
  Index padded() const { return round_up(heads, head_block); }

  /// Room for the scores of `rows` rows, and for the vector that runs over their end.
  template <class T>
  Index scores(Index rows) const {
    return round_up(rows * padded(), lanes<T>);
  }
};

/// The rows of a matrix that a pooling is shown, by their numbers and in the order of the list.
template <class T>
struct RowList {
  Tokens<T> rows;
  const Index* number = nullptr;
  Index count = 0;

  T* operator[](Index i) const { return rows.row(number[i]); }
  RowList part(Index first, Index length) const { return {rows, number + first, std::min(length, count - first)}; }
};

/// Where a pooling stands: max and sum of each head (-infinity and 0 before any row) and the mean so far.
template <class T>
struct SoftmaxPool {
  T* max;   // padded heads
  T* sum;   // padded heads
  T* mean;  // heads x dim

  static Index size(const PoolingShape& shape) { return 2 * shape.padded() + shape.width(); }

  static SoftmaxPool at(T* memory, const PoolingShape& shape) {
    return {memory, memory + shape.padded(), memory + 2 * shape.padded()};
  }

  void start(const PoolingShape& shape) const {
    std::fill_n(max, shape.padded(), -infinity<T>);
    std::fill_n(sum, shape.padded(), T(0));
    std::fill_n(mean, shape.width(), T(0));
  }

  void copy_from(const SoftmaxPool& other, const PoolingShape& shape) const {
    std::copy_n(other.max, size(shape), max);
  }

  /// Joins a pooling of other rows: mean = (sum mean + sum' mean') / (sum + sum'), both sums at the larger maximum.
  void merge(const SoftmaxPool& other, const PoolingShape& shape) const {
    for (Index h = 0; h < shape.heads; ++h) {
      if (other.sum[h] == T(0)) continue;
      const T larger = std::max(max[h], other.max[h]);
      const T mine = sum[h] * std::exp2(max[h] - larger);
      const T theirs = other.sum[h] * std::exp2(other.max[h] - larger);
      max[h] = larger;
      sum[h] = mine + theirs;
      const T share = theirs / sum[h];
      T* to = mean + h * shape.dim;
      const T* from = other.mean + h * shape.dim;
      for (Index c = 0; c < shape.dim; ++c) to[c] += share * (from[c] - to[c]);
    }
  }
};

template <class T>
T exp2_of_difference(T x, T max) {
  return max == -infinity<T> ? T(0) : std::exp2(x - max);
}

/// 2^x of `count` numbers in place; up to the next multiple of lanes<T> the array is written too.
template <class T>
void exp2_in_place(T* x, Index count) {
  for (Index i = 0; i < count; i += lanes<T>) pstoreu(x + i, exp2<T>(ploadu<Packet<T>>(x + i)));
}

/// scores(r, h) = weights(h) . rows[r] over `cols` columns, for `Rows` rows and `Heads` heads at once. Meanwhile asks
/// for the rows `next`.
template <int Rows, int Heads, class T>
NEARFAR_INLINE void score_block(const T* const (&rows)[Rows], const T* const (&next)[Rows], const T* weights,
                                Index weights_stride, Index cols, T* scores, Index padded) {
  Packet<T> sum[Rows][Heads];
  NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
    NEARFAR_UNROLL for (int h = 0; h < Heads; ++h) sum[r][h] = pset1<Packet<T>>(T(0));
  }
  Index c = 0;
  for (; c + lanes<T> <= cols; c += lanes<T>) {
    Packet<T> x[Rows];
    NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
      x[r] = ploadu<Packet<T>>(rows[r] + c);
      prefetch_far(next[r] + c);
    }
    NEARFAR_UNROLL for (int h = 0; h < Heads; ++h) {
      const Packet<T> w = ploadu<Packet<T>>(weights + h * weights_stride + c);
      NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) sum[r][h] = pmadd(x[r], w, sum[r][h]);
    }
  }
  NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
    NEARFAR_UNROLL for (int h = 0; h < Heads; ++h) scores[r * padded + h] = predux(sum[r][h]);
  }
  for (; c < cols; ++c) {
    for (int r = 0; r < Rows; ++r) {
      for (int h = 0; h < Heads; ++h) scores[r * padded + h] += rows[r][c] * weights[h * weights_stride + c];
    }
  }
}

/// Calls visit(heads, first_head, first_column, columns) for blocks of heads, `heads` an integral constant, and the
/// columns that their scores see: blocks of heads that see all columns, or single heads that see their own.
template <class Visit>
NEARFAR_INLINE void for_each_head_block(const PoolingShape& shape, Visit&& visit) {
  if (shape.own_columns) {
    for (Index h = 0; h < shape.heads; ++h) visit(std::integral_constant<int, 1>{}, h, shape.column(h), shape.dim);
  } else {
    for (Index h = 0; h < shape.heads; h += head_block) {
      visit(std::integral_constant<int, head_block>{}, h, Index{0}, shape.cols());
    }
  }
}

/// scores(i, h) = w_h . x_i for the rows [first, first + count) of the list.
template <class T>
void score_rows(const PoolingShape& shape, const T* weights, const RowList<const T>& list, Index first, Index count,
                T* scores) {
  constexpr Index ahead = 2 * row_block;
  const Index padded = shape.padded();
  if (shape.own_columns) std::fill_n(scores, count * padded, T(0));
  for_each_head_block(shape, [&](auto block, Index h, Index column, Index cols) {
    constexpr int heads = decltype(block)::value;
    const T* const w = weights + h * shape.cols() + column;
    const auto score = [&](auto several, Index i) {
      constexpr int rows = decltype(several)::value;
      const T* now[rows];
      const T* next[rows];
      for (int r = 0; r < rows; ++r) {
        now[r] = list[first + i + r] + column;
        next[r] = list[std::min(first + i + r + ahead, list.count - 1)] + column;
      }
      score_block<rows, heads>(now, next, w, shape.cols(), cols, scores + i * padded + h, padded);
    };
    Index i = 0;
    for (; i + row_block <= count; i += row_block) score(std::integral_constant<int, row_block>{}, i);
    for (; i < count; ++i) score(std::integral_constant<int, 1>{}, i);
  });
}

/// mean = keep mean + sum_i share_i rows[i], for `Vectors` vectors (or numbers) of columns.
template <class P, int Vectors, class T>
NEARFAR_INLINE void blend(const T* const* rows, Index count, const T* share, Index share_stride, T keep, Index column,
                          T* mean) {
  constexpr Index width = Eigen::internal::unpacket_traits<P>::size;
  P sum[Vectors];
  NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) sum[v] = pmul(pset1<P>(keep), ploadu<P>(mean + v * width));
  for (Index i = 0; i < count; ++i) {
    const P own = pset1<P>(share[i * share_stride]);
    NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) {
      sum[v] = pmadd(own, ploadu<P>(rows[i] + column + v * width), sum[v]);
    }
  }
  NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) pstoreu(mean + v * width, sum[v]);
}

/// Shows the rows of the list to the pooling. `scores` (shape.scores(list.count) numbers) is left holding the scores.
template <class T>
void pool(const PoolingShape& shape, const T* weights, const RowList<const T>& list, T* scores, SoftmaxPool<T> state,
          Scratch& scratch) {
  const Scratch::Scope scope(scratch);
  const Index padded = shape.padded();
  T* const share = scratch.take<T>(shape.scores<T>(pooling_tile));
  T* const keep = scratch.take<T>(padded);
  for (Index first = 0; first < list.count; first += pooling_tile) {
    const Index count = std::min(pooling_tile, list.count - first);
    T* const score = scores + first * padded;
    score_rows(shape, weights, list, first, count, score);

    // The old mean keeps sum' / sum of its weight, and row i gets 2^(score_i - max) / sum.
    for (Index h = 0; h < padded; h += head_block) {
      T larger[head_block];
      T shift[head_block];
      for (int j = 0; j < head_block; ++j) larger[j] = state.max[h + j];
      for (Index i = 0; i < count; ++i) {
        const T* const row = score + i * padded + h;
        for (int j = 0; j < head_block; ++j) larger[j] = larger[j] < row[j] ? row[j] : larger[j];
      }
      for (int j = 0; j < head_block; ++j) {
        keep[h + j] = state.sum[h + j] * exp2_of_difference(state.max[h + j], larger[j]);
        state.max[h + j] = larger[j];
        shift[j] = larger[j] == -infinity<T> ? T(0) : larger[j];
      }
      for (Index i = 0; i < count * padded; i += padded) {
        for (int j = 0; j < head_block; ++j) share[i + h + j] = score[i + h + j] - shift[j];
      }
    }
    exp2_in_place(share, count * padded);
    for (Index h = 0; h < padded; h += head_block) {
      T total[head_block] = {};
      T inverse[head_block];
      for (Index i = 0; i < count * padded; i += padded) {
        for (int j = 0; j < head_block; ++j) total[j] += share[i + h + j];
      }
      for (int j = 0; j < head_block; ++j) {
        const T sum = keep[h + j] + total[j];
        inverse[j] = sum == T(0) ? T(0) : T(1) / sum;
        keep[h + j] *= inverse[j];
        state.sum[h + j] = sum;
      }
      for (Index i = 0; i < count * padded; i += padded) {
        for (int j = 0; j < head_block; ++j) share[i + h + j] *= inverse[j];
      }
    }
    const T* rows[pooling_tile];
    for (Index i = 0; i < count; ++i) rows[i] = list[first + i];
    for (Index h = 0; h < shape.heads; ++h) {
      constexpr int vectors = 4;
      const auto columns = [&](auto by, auto several, Index c) {
        using P = typename decltype(by)::template Of<T>;
        blend<P, several>(rows, count, share + h, padded, keep[h], shape.column(h) + c, state.mean + h * shape.dim + c);
      };
      Index c = 0;
      for (; c + vectors * lanes<T> <= shape.dim; c += vectors * lanes<T>) {
        columns(ByVectors{}, std::integral_constant<int, vectors>{}, c);
      }
      for (; c + lanes<T> <= shape.dim; c += lanes<T>) columns(ByVectors{}, std::integral_constant<int, 1>{}, c);
      for (; c < shape.dim; ++c) columns(ByNumbers{}, std::integral_constant<int, 1>{}, c);
    }
  }
}

/// The gradient of scores = rows weights^T: grad_row_i += sum_h grad_score_ih w_h for the rows listed in `grad_rows`,
/// and grad_weights_h += sum_i grad_score_ih x_i.
template <class T>
void score_rows_backward(const PoolingShape& shape, const T* weights, const RowList<const T>& list,
                         const T* grad_scores, const RowList<T>& grad_rows, T* grad_weights) {
  const Index padded = shape.padded();
  for_each_head_block(shape, [&](auto block, Index first, Index column, Index cols) {
    constexpr int heads = decltype(block)::value;
    for_each_packet<T>(cols, [&](auto by, Index c) {
      using P = typename decltype(by)::template Of<T>;
      const Index at = first * shape.cols() + column + c;
      P w[heads];
      P sum[heads];
      NEARFAR_UNROLL for (int h = 0; h < heads; ++h) {
        w[h] = ploadu<P>(weights + at + h * shape.cols());
        sum[h] = ploadu<P>(grad_weights + at + h * shape.cols());
      }
      for (Index i = 0; i < list.count; ++i) {
        const P x = ploadu<P>(list[i] + column + c);
        P grad = ploadu<P>(grad_rows[i] + column + c);
        NEARFAR_UNROLL for (int h = 0; h < heads; ++h) {
          const P score = pset1<P>(grad_scores[i * padded + first + h]);
          grad = pmadd(score, w[h], grad);
          sum[h] = pmadd(score, x, sum[h]);
        }
        pstoreu(grad_rows[i] + column + c, grad);
      }
      NEARFAR_UNROLL for (int h = 0; h < heads; ++h) pstoreu(grad_weights + at + h * shape.cols(), sum[h]);
    });
  });
}

template <class T>
T dot(const T* x, const T* y, Index count) {
  Packet<T> sum = pset1<Packet<T>>(T(0));
  T rest = T(0);
  for_each_packet<T>(count, [&](auto by, Index c) {
    using P = typename decltype(by)::template Of<T>;
    const auto product = [&](auto& total) { total = pmadd(ploadu<P>(x + c), ploadu<P>(y + c), total); };
    if constexpr (std::is_same_v<decltype(by), ByVectors>) {
      product(sum);
    } else {
      product(rest);
    }
  });
  return predux(sum) + rest;
}

/// The gradient of `pool` for the rows of the list. `weights_of_rows` holds weight_ih and becomes the gradient of the
/// scores, weight_ih (x_i - mean_h) . grad_mean_h; grad_row_i = start_i + what reaches x_i (start may be null: zero),
/// and the gradient of the weights is added to grad_weights. `center` holds mean_h . grad_mean_h.
template <class T>
void pool_backward(const PoolingShape& shape, const T* weights, const RowList<const T>& list, T* weights_of_rows,
                   const T* center, const T* grad_mean, Tokens<const T> start, Tokens<T> grad_rows, T* grad_weights) {
  const Index padded = shape.padded();
  const Index groups = shape.heads / shape.group;
  for (Index first = 0; first < list.count; first += pooling_tile) {
    const RowList<const T> tile = list.part(first, pooling_tile);
    const RowList<T> grad{grad_rows, tile.number, tile.count};
    for (Index i = 0; i < tile.count; ++i) {
      T* const weight = weights_of_rows + (first + i) * padded;
      const T* const from = start.data() == nullptr ? nullptr : start.row(tile.number[i]);
      for (Index g = 0; g < groups; ++g) {
        for_each_packet<T>(shape.dim, [&](auto by, Index c) {
          using P = typename decltype(by)::template Of<T>;
          P sum = from == nullptr ? pset1<P>(T(0)) : ploadu<P>(from + g * shape.dim + c);
          for (Index h = g * shape.group; h < (g + 1) * shape.group; ++h) {
            sum = pmadd(pset1<P>(weight[h]), ploadu<P>(grad_mean + h * shape.dim + c), sum);
          }
          pstoreu(grad[i] + g * shape.dim + c, sum);
        });
      }
      for (Index h = 0; h < shape.heads; ++h) {
        const T along = dot(tile[i] + shape.column(h), grad_mean + h * shape.dim, shape.dim);
        weight[h] *= ln_2<T> * (along - center[h]);
      }
    }
    score_rows_backward(shape, weights, tile, weights_of_rows + first * padded, grad, grad_weights);
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
