#pragma once

#include <nearfar/engine/softmax_pooling_backward.hpp>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// The prefix form of softmax pooling: every row has the mean of the rows up to it, each weighted by the softmax that
// ends with that row. One number a row and head says it all, the weight w_i that row i has in its own softmax:
//
//   mean_i = mean_(i-1) + w_i (x_i - mean_(i-1))

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

  void copy_from(const SuffixSums& other, const PoolingShape& shape) const {
    std::copy_n(other.scalar, size(shape), scalar);
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
