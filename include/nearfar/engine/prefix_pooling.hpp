#pragma once

#include <nearfar/engine/softmax_pooling_backward.hpp>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// The prefix form of softmax pooling: every row has the mean of the rows up to it, each weighted by the softmax that
// ends with that row. One number a row and head says it all, the weight w_i that row i has in its own softmax:
//
//   mean_i = mean_(i-1) + w_i (x_i - mean_(i-1))

/// What each row weighs in the softmax that ends with it, weight_i = 2^(score_i - max_i) / sum_i over the rows up to i.
/// Takes `count` rows of scores to their weights, in place; state.max and state.sum move on.
template <class T>
void prefix_weights(const PoolingShape& shape, T* scores, Index count, const SoftmaxPool<T>& state, Scratch& scratch) {
  const Scratch::Scope scope(scratch);
  using P = HeadPacket<T>;
  constexpr int width = Eigen::internal::unpacket_traits<P>::size;
  const Index padded = shape.padded();
  T* const keep = scratch.take<T>(shape.scores<T>(count));
  for (Index h = 0; h < padded; h += width) {
    P max = ploadu<P>(state.max + h);
    for (Index at = h; at < count * padded; at += padded) {
      const P score = ploadu<P>(scores + at);
      const P larger = pmax(max, score);
      const P shift = pselect(pcmp_eq(larger, pset1<P>(-infinity<T>)), pset1<P>(T(0)), larger);
      pstoreu(scores + at, psub(score, shift));
      pstoreu(keep + at, psub(max, shift));
      max = larger;
    }
    pstoreu(state.max + h, max);
  }
  exp2_in_place(scores, count * padded);
  exp2_in_place(keep, count * padded);
  for (Index h = 0; h < padded; h += width) {
    P sum = ploadu<P>(state.sum + h);
    for (Index at = h; at < count * padded; at += padded) {
      const P own = ploadu<P>(scores + at);
      sum = pmadd(ploadu<P>(keep + at), sum, own);
      const P none = pset1<P>(T(0));
      pstoreu(scores + at, pselect(pcmp_eq(sum, none), none, Eigen::internal::pdiv(own, sum)));
    }
    pstoreu(state.sum + h, sum);
  }
}

/// One step of the prefix means, mean_i = mean_(i-1) + weight_i (x_i - mean_(i-1)), in vectors or numbers.
template <class P, class T>
NEARFAR_INLINE P advance(const P& x, const T& weight, T* mean) {
  const P before = ploadu<P>(mean);
  const P now = pmadd(pset1<P>(weight), psub(x, before), before);
  pstoreu(mean, now);
  return now;
}

/// Takes row x_i into the prefix means, one column of x to each of theirs. then(head) gives what is called with each
/// packet of the head's mean_i, and its first column counted from the head's.
template <class T, class Then>
NEARFAR_INLINE void advance_means(const PoolingShape& shape, const T* weight, const T* x, T* mean, Then&& then) {
  const Index dim = shape.dim;
  for (Index h = 0; h < shape.heads; ++h, x += dim, mean += dim) {
    const T share = weight[h];
    const auto use = then(h);
    for_each_packet<T>(dim, [=](auto by, Index c) {
      using P = typename decltype(by)::template Of<T>;
      use(c, advance(ploadu<P>(x + c), share, mean + c));
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
  T* vector;   // heads x dim
  T* scalar;   // padded heads
  T* keep;     // padded heads: of all rows passed
  T* product;  // padded heads: room for inner products

  static Index size(const PoolingShape& shape) { return 3 * shape.padded() + shape.width(); }

  static SuffixSums at(T* memory, const PoolingShape& shape) {
    const Index padded = shape.padded();
    return {memory + 3 * padded, memory, memory + padded, memory + 2 * padded};
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
  dot_heads(shape, mean, grad_mean, after.product);
  for (Index h = 0; h < shape.heads; ++h) {
    after.scalar[h] += after.product[h];
    const T share = weight == nullptr ? T(0) : weight[h];
    for_each_packet<T>(shape.dim, [=, vector = after.vector + h * shape.dim, at = h * shape.dim](auto by, Index c) {
      using P = typename decltype(by)::template Of<T>;
      const P sum = padd(ploadu<P>(vector + c), ploadu<P>(grad_mean + at + c));
      pstoreu(vector + c, sum);
      if (x != nullptr) pstoreu(grad_x + at + c, pmul(pset1<P>(share), sum));
    });
  }
  if (weight == nullptr) return;
  if (x != nullptr) dot_heads(shape, x, after.vector, after.product);
  for (Index h = 0; h < shape.heads; ++h) {
    const T share = weight[h];
    if (x != nullptr) grad_scores[h] = ln_2<T> * share * (after.product[h] - after.scalar[h]);
    // A row that takes all the weight leaves nothing to those before it, not even what is not finite.
    const T left = T(1) - share;
    after.keep[h] *= left;
    T* const vector = after.vector + h * shape.dim;
    if (left == T(0)) {
      after.scalar[h] = T(0);
      std::fill_n(vector, shape.dim, T(0));
    } else {
      after.scalar[h] *= left;
      for (Index c = 0; c < shape.dim; ++c) vector[c] *= left;
    }
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
