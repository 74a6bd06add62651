#pragma once

#include <nearfar/engine/additive/softmax_pooling_backward.hpp>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// The prefix form of softmax pooling: every row has the mean of the rows up to it, each weighted by the softmax that
// ends with that row. One number a row and head says it all, the weight w_i that row i has in its own softmax:
//
//   mean_i = mean_(i-1) + w_i (x_i - mean_(i-1))

/// The most tokens of a stretch of the prefix form: what backward recomputes at a time.
inline constexpr Index prefix_stretch = 64;

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
      const P shift = shift_of(larger);
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
      pstoreu(scores + at, pselect(pcmp_eq(sum, none), none, pdiv(own, sum)));
    }
    pstoreu(state.sum + h, sum);
  }
}

/// One step of the prefix means, mean_i = mean_(i-1) + weight_i (x_i - mean_(i-1)), in vectors or numbers.
template <class P>
NEARFAR_INLINE P advance(const P& mean, const P& weight, const P& x) {
  return pmadd(weight, psub(x, mean), mean);
}

/// The same of means in memory.
template <class P, class T>
NEARFAR_INLINE P advance_in_memory(const P& x, const T& weight, T* mean) {
  const P now = advance(ploadu<P>(mean), pset1<P>(weight), x);
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
      use(c, advance_in_memory(ploadu<P>(x + c), share, mean + c));
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
  T* scalar;  // heads x lanes<T>, yet to be summed over the lanes
  T* keep;    // heads: of all rows passed

  static Index size(const PoolingShape& shape) { return shape.width() + shape.heads * (lanes<T> + 1); }

  static SuffixSums at(T* memory, const PoolingShape& shape) {
    T* const scalar = memory + shape.width();
    return {memory, scalar, scalar + shape.heads * lanes<T>};
  }

  void start(const PoolingShape& shape) const {
    std::fill_n(vector, size(shape), T(0));
    std::fill_n(keep, shape.heads, T(1));
  }

  void copy_from(const SuffixSums& other, const PoolingShape& shape) const {
    std::copy_n(other.vector, size(shape), vector);
  }

  /// These sums, of a stretch of rows, with those of the rows after the stretch.
  void join(const SuffixSums& after, const PoolingShape& shape) const {
    const auto join_numbers = [](T* own, T share, const T* other, Index count) {
      for (Index c = 0; c < count; ++c) own[c] += share * other[c];
    };
    for (Index h = 0; h < shape.heads; ++h) {
      join_numbers(vector + h * shape.dim, keep[h], after.vector + h * shape.dim, shape.dim);
      join_numbers(scalar + h * lanes<T>, keep[h], after.scalar + h * lanes<T>, lanes<T>);
      keep[h] *= after.keep[h];
    }
  }
};

/// The rows of a stretch, walked from its last to its first, each array an address a row. The prefix mean_i of rows x_i
/// is multiplied by factor_i, feature by feature (the heads of a group share it), and grad_i is the gradient of that
/// product:
///
///   grad_factor_i = mean_i grad_i             grad_mean_i = factor_i grad_i
///   grad_x_i = weight_i vector                grad_score_i = ln 2 weight_i (x_i . vector - scalar)
///
/// with both sums when they have taken grad_mean_i in; grad_x_i is the share that passes through the means.
template <class T>
struct PrefixRows {
  Index count = 0;
  const T* weight[prefix_stretch];  ///< of each head; zero where the means do not take x_i in
  const T* mean[prefix_stretch];
  const T* factor[prefix_stretch];
  const T* grad[prefix_stretch];
  const T* x[prefix_stretch];
  T* grad_x[prefix_stretch];
  T* grad_factor[prefix_stretch];
  T* grad_score[prefix_stretch];  ///< of each head

  /// How often either walk fetches meanwhile.
  Index fetches(const PoolingShape& shape) const { return count * shape.heads; }

  /// Takes the rows into the sums.
  void leave(const PoolingShape& shape, const SuffixSums<T>& sums, Spread& fetch) const {
    for (Index h = 0; h < shape.heads; ++h) {
      for_each_column_block<4, T>(shape.dim, [&](auto by, auto packets, Index first) {
        using P = typename decltype(by)::template Of<T>;
        walk<P, decltype(packets)::value, false>(shape, h, first, sums, nullptr, fetch);
      });
      for (Index i = 0; i < count; ++i) sums.keep[h] *= T(1) - weight[i][h];
    }
  }

  /// And writes the gradients.
  void go_back(const PoolingShape& shape, const SuffixSums<T>& sums, Spread& fetch) const {
    alignas(Scratch::alignment) T lane_scores[prefix_stretch * lanes<T>];
    for (Index h = 0; h < shape.heads; ++h) {
      std::fill_n(lane_scores, prefix_stretch * lanes<T>, T(0));
      for_each_column_block<4, T>(shape.dim, [&](auto by, auto packets, Index first) {
        using P = typename decltype(by)::template Of<T>;
        walk<P, decltype(packets)::value, true>(shape, h, first, sums, lane_scores, fetch);
      });
      for (Index i = 0; i < count; i += lanes<T>) {
        Packet<T> packets[lanes<T>];
        for (Index r = 0; r < lanes<T>; ++r) packets[r] = ploadu<Packet<T>>(lane_scores + (i + r) * lanes<T>);
        T scores[lanes<T>];
        pstoreu(scores, sum_lanes(packets));
        for (Index r = 0; r < std::min<Index>(lanes<T>, count - i); ++r) {
          grad_score[i + r][h] = ln_2<T> * weight[i + r][h] * scores[r];
        }
      }
    }
  }

 private:
  /// Some columns of one head, from its column `first` on. Their sums stay in registers from row to row; what is summed
  /// over columns is left in the lanes.
  template <class P, int Packets, bool Write>
  NEARFAR_INLINE void walk(const PoolingShape& shape, Index h, Index first, const SuffixSums<T>& sums, T* lane_scores,
                           Spread& fetch) const {
    constexpr Index width = Index{sizeof(P) / sizeof(T)};
    const Index own = h * shape.dim + first;
    const Index shared = shape.column(h) + first;
    const bool begins_group = h % shape.group == 0;
    const P zero = pset1<P>(T(0));
    T* const vector_sum = sums.vector + own;
    T* const scalar_sum = sums.scalar + h * lanes<T>;
    P vector[Packets];
    NEARFAR_UNROLL for (int p = 0; p < Packets; ++p) vector[p] = ploadu<P>(vector_sum + p * width);
    P scalar = first == 0 ? ploadu<P>(scalar_sum) : zero;
    for (Index i = count; i-- > 0;) {
      fetch();
      const T share = weight[i][h];
      P inner = zero, score = zero;
      // Addresses read here would be read again after each store, which might have changed them.
      const T* const from_grad = grad[i] + own;
      const T* const from_factor = factor[i] + shared;
      const T* const from_mean = mean[i] + own;
      const T* const from_x = Write ? x[i] + own : nullptr;
      T* const to_x = Write ? grad_x[i] + own : nullptr;
      T* const to_factor = Write ? grad_factor[i] + shared : nullptr;
      NEARFAR_UNROLL for (int p = 0; p < Packets; ++p) {
        const Index c = p * width;
        const P grad_product = ploadu<P>(from_grad + c);
        const P factors = ploadu<P>(from_factor + c);
        const P grad_factors = pmul(ploadu<P>(from_mean + c), grad_product);
        inner = pmadd(grad_factors, factors, inner);
        vector[p] = pmadd(grad_product, factors, vector[p]);
        if constexpr (Write) {
          pstoreu(to_factor + c, begins_group ? grad_factors : P(padd(grad_factors, ploadu<P>(to_factor + c))));
          pstoreu(to_x + c, pmul(pset1<P>(share), vector[p]));
          score = pmadd(ploadu<P>(from_x + c), vector[p], score);
        }
      }
      scalar = padd(scalar, inner);
      if constexpr (Write) {
        T* const to = lane_scores + i * lanes<T>;
        pstoreu(to, padd(ploadu<P>(to), psub(score, scalar)));
      }
      // A row that takes all the weight leaves nothing to those before it, not even what is not finite.
      const T left = T(1) - share;
      const auto fade = [left = pset1<P>(left), zero, none = left == T(0)](P& sum) {
        sum = none ? zero : P(pmul(left, sum));
      };
      fade(scalar);
      NEARFAR_UNROLL for (int p = 0; p < Packets; ++p) fade(vector[p]);
    }
    NEARFAR_UNROLL for (int p = 0; p < Packets; ++p) pstoreu(vector_sum + p * width, vector[p]);
    pstoreu(scalar_sum, first == 0 ? scalar : P(padd(scalar, ploadu<P>(scalar_sum))));
  }
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
