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

template <class T, int Rows>
NEARFAR_INLINE void score_block(const T* const (&rows)[Rows], const T* const (&next)[Rows], const T* weights,
                                Index cols, T* scores, Index padded) {
  Packet<T> sum[Rows][head_block];
  NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
    NEARFAR_UNROLL for (int h = 0; h < head_block; ++h) sum[r][h] = pset1<Packet<T>>(T(0));
  }
  Index c = 0;
  for (; c + lanes<T> <= cols; c += lanes<T>) {
    Packet<T> x[Rows];
    NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
      x[r] = ploadu<Packet<T>>(rows[r] + c);
      prefetch_far(next[r] + c);
    }
    NEARFAR_UNROLL for (int h = 0; h < head_block; ++h) {
      const Packet<T> w = ploadu<Packet<T>>(weights + h * cols + c);
      NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) sum[r][h] = pmadd(x[r], w, sum[r][h]);
    }
  }
  NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
    NEARFAR_UNROLL for (int h = 0; h < head_block; ++h) scores[r * padded + h] = predux(sum[r][h]);
  }
  for (; c < cols; ++c) {
    for (int r = 0; r < Rows; ++r) {
      for (int h = 0; h < head_block; ++h) scores[r * padded + h] += rows[r][c] * weights[h * cols + c];
    }
  }
}

/// scores(i, h) = w_h . x_i for the rows [first, first + count) of the list, asking for rows further on meanwhile.
template <class T>
void score_rows(const PoolingShape& shape, const T* weights, const RowList<const T>& list, Index first, Index count,
                T* scores) {
  constexpr Index ahead = 2 * row_block;
  const Index cols = shape.cols();
  const Index padded = shape.padded();
  const auto later = [&](Index i) { return list[std::min(i + ahead, list.count - 1)]; };
  for (Index h = 0; h < padded; h += head_block) {
    const T* w = weights + h * cols;
    Index i = 0;
    for (; i + row_block <= count; i += row_block) {
      const T* const rows[] = {list[first + i], list[first + i + 1], list[first + i + 2]};
      const T* const next[] = {later(first + i), later(first + i + 1), later(first + i + 2)};
      score_block<T, row_block>(rows, next, w, cols, scores + i * padded + h, padded);
    }
    for (; i < count; ++i) {
      const T* const rows[] = {list[first + i]};
      const T* const next[] = {later(first + i)};
      score_block<T, 1>(rows, next, w, cols, scores + i * padded + h, padded);
    }
  }
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
    for (Index h = 0; h < padded; ++h) {
      T larger = state.max[h];
      for (Index i = 0; i < count; ++i) larger = std::max(larger, score[i * padded + h]);
      keep[h] = state.sum[h] * exp2_of_difference(state.max[h], larger);
      const T shift = larger == -infinity<T> ? T(0) : larger;
      for (Index i = 0; i < count; ++i) share[i * padded + h] = score[i * padded + h] - shift;
      state.max[h] = larger;
    }
    exp2_in_place(share, count * padded);
    for (Index h = 0; h < padded; ++h) {
      T total = T(0);
      for (Index i = 0; i < count; ++i) total += share[i * padded + h];
      state.sum[h] = keep[h] + total;
      const T inverse = state.sum[h] == T(0) ? T(0) : T(1) / state.sum[h];
      keep[h] *= inverse;
      for (Index i = 0; i < count; ++i) share[i * padded + h] *= inverse;
    }
    for (Index h = 0; h < shape.heads; ++h) {
      T* const mean = state.mean + h * shape.dim;
      for_each_packet<T>(shape.dim, [&](auto by, Index c) {
        using P = typename decltype(by)::template Of<T>;
        P sum = pmul(pset1<P>(keep[h]), ploadu<P>(mean + c));
        for (Index i = 0; i < count; ++i) {
          sum = pmadd(pset1<P>(share[i * padded + h]), ploadu<P>(list[first + i] + shape.column(h) + c), sum);
        }
        pstoreu(mean + c, sum);
      });
    }
  }
}

/// The prefix form: what each row weighs in the softmax that ends with it, weight_i = 2^(score_i - max_i) / sum_i over
/// the rows up to i. Takes `count` rows of scores to their weights, in place; state.max and state.sum move on.
template <class T>
void prefix_weights(const PoolingShape& shape, T* scores, Index count, SoftmaxPool<T> state, Scratch& scratch) {
  const Scratch::Scope scope(scratch);
  const Index padded = shape.padded();
  // Of 2^(old max - max) and 2^(score - max) one is 1 and the other 2^-|score - old max|.
  T* const smaller = scratch.take<T>(shape.scores<T>(count));
  T* const old_max = scratch.take<T>(padded);
  std::copy_n(state.max, padded, old_max);
  for (Index i = 0; i < count * padded; i += padded) {
    for (Index h = 0; h < padded; ++h) {
      const T score = scores[i + h];
      const T max = state.max[h];
      smaller[i + h] = score == max ? T(0) : -std::abs(score - max);
      state.max[h] = std::max(max, score);
    }
  }
  exp2_in_place(smaller, count * padded);
  for (Index i = 0; i < count * padded; i += padded) {
    for (Index h = 0; h < padded; ++h) {
      const T score = scores[i + h];
      const bool larger = score > old_max[h];
      const T kept = larger ? state.sum[h] * smaller[i + h] : state.sum[h];
      const T own = larger ? T(1) : score == -infinity<T> ? T(0) : smaller[i + h];
      old_max[h] = std::max(old_max[h], score);
      state.sum[h] = kept + own;
      scores[i + h] = state.sum[h] == T(0) ? T(0) : own / state.sum[h];
    }
  }
}

/// The means up to each row: mean_i = mean_(i-1) + weight_i (x_i - mean_(i-1)). A row that is not `visible` is not read
/// and changes nothing; `weights` holds those of the visible rows. state.mean moves on.
template <class T>
void prefix_means(const PoolingShape& shape, const T* weights, Tokens<const T> rows, const bool* visible,
                  SoftmaxPool<T> state, Tokens<T> means) {
  const Index padded = shape.padded();
  for (Index h = 0; h < shape.heads; ++h) {
    const Index column = shape.column(h);
    for_each_packet<T>(shape.dim, [&](auto by, Index c) {
      using P = typename decltype(by)::template Of<T>;
      const Index at = h * shape.dim + c;
      P mean = ploadu<P>(state.mean + at);
      const T* weight = weights + h;
      for (Index i = 0; i < means.rows(); ++i) {
        if (visible[i]) {
          mean = pmadd(pset1<P>(*weight), psub(ploadu<P>(rows.row(i) + column + c), mean), mean);
          weight += padded;
        }
        pstoreu(means.row(i) + at, mean);
      }
      pstoreu(state.mean + at, mean);
    });
  }
}

/// The gradient of scores = rows weights^T: grad_row_i += sum_h grad_score_ih w_h for the rows listed in `grad_rows`,
/// and grad_weights_h += sum_i grad_score_ih x_i.
template <class T>
void score_rows_backward(const PoolingShape& shape, const T* weights, const RowList<const T>& list,
                         const T* grad_scores, const RowList<T>& grad_rows, T* grad_weights) {
  const Index cols = shape.cols();
  const Index padded = shape.padded();
  for (Index first = 0; first < padded; first += head_block) {
    for_each_packet<T>(cols, [&](auto by, Index c) {
      using P = typename decltype(by)::template Of<T>;
      P w[head_block];
      P sum[head_block];
      NEARFAR_UNROLL for (int h = 0; h < head_block; ++h) {
        w[h] = ploadu<P>(weights + (first + h) * cols + c);
        sum[h] = ploadu<P>(grad_weights + (first + h) * cols + c);
      }
      for (Index i = 0; i < list.count; ++i) {
        const P x = ploadu<P>(list[i] + c);
        P grad = ploadu<P>(grad_rows[i] + c);
        NEARFAR_UNROLL for (int h = 0; h < head_block; ++h) {
          const P score = pset1<P>(grad_scores[i * padded + first + h]);
          grad = pmadd(score, w[h], grad);
          sum[h] = pmadd(score, x, sum[h]);
        }
        pstoreu(grad_rows[i] + c, grad);
      }
      NEARFAR_UNROLL for (int h = 0; h < head_block; ++h) pstoreu(grad_weights + (first + h) * cols + c, sum[h]);
    });
  }
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

/// What the rows after row i leave for it, in the backward pass of the prefix form:
///
///   vector_i = sum_(t > i) keep_it grad_mean_t        scalar_i = sum_(t > i) keep_it mean_t . grad_mean_t
///
/// with keep_it = (1 - weight_(i+1)) ... (1 - weight_t), what is left at t of a weight that was 1 at row i.
template <class T>
struct SuffixSums {
  T* vector;  // heads x dim
  T* scalar;  // padded heads
  T* keep;    // padded heads: of all rows passed

  static Index size(const PoolingShape& shape) { return 2 * shape.padded() + shape.width(); }

  static SuffixSums at(T* memory, const PoolingShape& shape) {
    return {memory + 2 * shape.padded(), memory, memory + shape.padded()};
  }

  void start(const PoolingShape& shape) const {
    std::fill_n(vector, shape.width(), T(0));
    std::fill_n(scalar, shape.padded(), T(0));
    std::fill_n(keep, shape.padded(), T(1));
  }

  /// These sums, of a stretch of rows, with those of the rows after the stretch.
  void join(const SuffixSums& after, const PoolingShape& shape) const {
    for (Index h = 0; h < shape.heads; ++h) {
      scalar[h] += keep[h] * after.scalar[h];
      for (Index c = h * shape.dim; c < (h + 1) * shape.dim; ++c) vector[c] += keep[h] * after.vector[c];
      keep[h] *= after.keep[h];
    }
  }
};

/// Takes row i into the sums, and where `x` is not null writes what reaches it: grad_x = weight_i vector (the share
/// that passes through the mean), grad_scores = weight_i (x . vector - scalar), both sums with row i's own gradient in
/// them. A row that is not visible has weights null. grad_x may be grad_mean.
template <class T>
void prefix_backward_row(const PoolingShape& shape, const T* mean, const T* grad_mean, const T* weight, const T* x,
                         const SuffixSums<T>& after, T* grad_x, T* grad_scores) {
  for (Index h = 0; h < shape.heads; ++h) {
    const Index first = h * shape.dim;
    T* const vector = after.vector + first;
    after.scalar[h] += dot(mean + first, grad_mean + first, shape.dim);
    const T share = weight == nullptr ? T(0) : weight[h];
    for_each_packet<T>(shape.dim, [&](auto by, Index c) {
      using P = typename decltype(by)::template Of<T>;
      const P sum = padd(ploadu<P>(vector + c), ploadu<P>(grad_mean + first + c));
      pstoreu(vector + c, sum);
      if (x != nullptr) pstoreu(grad_x + first + c, pmul(pset1<P>(share), sum));
    });
    if (weight == nullptr) continue;
    if (x != nullptr) grad_scores[h] = ln_2<T> * share * (dot(x + first, vector, shape.dim) - after.scalar[h]);
    // A row that takes all the weight leaves nothing to those before it.
    const T left = T(1) - share;
    after.scalar[h] = left == T(0) ? T(0) : left * after.scalar[h];
    after.keep[h] *= left;
    for (Index c = 0; c < shape.dim; ++c) vector[c] = left == T(0) ? T(0) : left * vector[c];
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
