#pragma once

#include <nearfar/detail/exp.hpp>
#include <nearfar/detail/transpose.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

template <class T>
inline constexpr T infinity = std::numeric_limits<T>::infinity();

/// Vectors of scores that become weights at once: enough of them hide what each waits for.
inline constexpr int weights_at_once = vector_registers >= 32 ? 8 : vector_registers >= 16 ? 4 : 1;

/// What query . key is multiplied by to be a score in units of log 2, whose exp is exp2.
template <class T>
T log2_scale(double scale) {
  return T(scale * log2_e<double>);
}

/// What scores with these maxima are shifted by: the maximum or, where no key was seen, 0, as -infinity - -infinity is
/// NaN.
template <class P>
NEARFAR_INLINE P shift_of(const P& max) {
  using T = typename Eigen::internal::unpacket_traits<P>::type;
  return pselect(pcmp_eq(max, pset1<P>(-infinity<T>)), pset1<P>(T(0)), max);
}

/// The natural log-sum-exp of scores in units of log 2, from their maximum and the sum of 2^(score - max): -infinity
/// where there is none. Always a double: at a logit of 1e4 a float is off by up to 5e-4, and so would be every weight
/// that the backward pass takes from it.
template <class T>
double natural_log_sum_exp(T max, T sum) {
  return sum == T(0) ? -infinity<double> : ln_2<double> * double{max} + std::log(double{sum});
}

/// What the backward pass subtracts from a query's scores, in units of log 2, to find its weights again: its
/// log-sum-exp rounded to T, and the rest that rounding lost, which would be a relative error of all of them. A query
/// that saw no key weighs every key with 2^(s - infinity) = 0.
template <class T>
struct Shift {
  T nearest = infinity<T>;
  T rest = T(0);

  Shift() = default;
  explicit Shift(double log_sum_exp) {
    if (log_sum_exp == -infinity<double>) return;
    const double exact = log2_e<double> * log_sum_exp;
    nearest = T(exact);
    rest = T(exact - double{nearest});
  }

  bool sees() const { return nearest != infinity<T>; }
};

/// The weights 2^(score - L) to be, from the scores and a Shift of their queries: at most 1, also where a score of many
/// digits is rounded otherwise than it was when L was found.
template <class P>
NEARFAR_INLINE P weight_exponent(const P& score, const P& nearest, const P& rest) {
  using T = typename Eigen::internal::unpacket_traits<P>::type;
  return pmin(P(psub(psub(score, nearest), rest)), pset1<P>(T(0)));
}

/// What two parts weigh in the merged result, and its log-sum-exp.
struct MergeWeights {
  double a;
  double b;
  double log_sum_exp;

  MergeWeights(double log_sum_exp_a, double log_sum_exp_b) {
    const double larger = std::max(log_sum_exp_a, log_sum_exp_b);
    const double shift = larger == -infinity<double> ? 0 : larger;
    a = std::exp(log_sum_exp_a - shift);
    b = std::exp(log_sum_exp_b - shift);
    const double sum = a + b;
    log_sum_exp = shift + std::log(sum);
    if (sum == 0) return;
    a /= sum;
    b /= sum;
  }
};

/// Joins to the triple of online softmax for one query that of further keys, both taken at the larger maximum; where
/// these are none it changes nothing.
template <class T>
void merge_triples(T& max, T& sum, T* value, T other_max, T other_sum, const T* other_value, Index value_dim) {
  if (other_sum == T(0)) return;
  const T larger = std::max(max, other_max);
  const T mine = std::exp2(max - larger);
  const T theirs = std::exp2(other_max - larger);
  max = larger;
  sum = mine * sum + theirs * other_sum;
  for (Index c = 0; c < value_dim; ++c) value[c] = mine * value[c] + theirs * other_value[c];
}

/// The softmax of a panel of queries over the keys met so far, one query a lane, as the triple of online softmax:
///
///   max_i = max_j s_ij      sum_i = sum_j 2^(s_ij - max_i)      value_i = sum_j 2^(s_ij - max_i) v_j
///
/// with scores s in units of log 2, so that exp is exp2. Before any key it is (-infinity, 0, 0). Triples over different
/// keys merge by rescaling to the larger maximum; value_i / sum_i is the attention and max_i + log2 sum_i the
/// log-sum-exp (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., FlashAttention, arXiv 2205.14135, algorithm 1).
template <class T, int Vectors>
struct OnlineSoftmax {
  static constexpr Index width = Vectors * lanes<T>;

  T* max;    // width
  T* sum;    // width
  T* value;  // value_dim x width
  Index value_dim;

  void start() {
    std::fill_n(max, width, -infinity<T>);
    std::fill_n(sum, width, T(0));
    std::fill_n(value, value_dim * width, T(0));
  }

  /// Takes the maximum of further scores of vector v (`count` keys, a multiple of weights_at_once, a row of `width`
  /// each) into the triple's maximum, replaces each score by 2^(score - maximum), adds these to the sum, and returns
  /// the factor by which the old value shrinks.
  NEARFAR_INLINE Packet<T> update(int v, T* scores, Index count, const Packet<T>& new_max) {
    const Packet<T> old = ploadu<Packet<T>>(max + v * lanes<T>);
    const Packet<T> larger = pmax(old, new_max);
    pstoreu(max + v * lanes<T>, larger);
    const Packet<T> shift = shift_of(larger);
    const Packet<T> correction = exp2<T>(psub(old, shift));
    Packet<T> total = pset1<Packet<T>>(T(0));
    for (Index j = 0; j < count; j += weights_at_once) weigh(scores + v * lanes<T> + j * width, shift, total);
    // Each tile's sum starts at zero and joins by one multiply-add: short sums keep the rounding errors small.
    T* s = sum + v * lanes<T>;
    pstoreu(s, pmadd(ploadu<Packet<T>>(s), correction, total));
    return correction;
  }

  /// Writes the attention of `count` queries, value / sum, to the rows of out, each feature times its `factor` unless
  /// that is null, and their log-sum-exp (natural) unless that is null. A query that saw no key gets zeros and
  /// -infinity. Vectors are written by store(to, packet). Uses up the triple.
  void finish(Index count, T* out, Index out_stride, double* log_sum_exp, const T* factor, KeepOrPastCaches store) {
    for (Index i = 0; i < count; ++i) {
      if (log_sum_exp != nullptr) {
        log_sum_exp[i] = natural_log_sum_exp(max[i], sum[i]);
      }
      sum[i] = sum[i] == T(0) ? T(0) : T(1) / sum[i];
    }
    for (Index c = 0; c < value_dim && factor != nullptr; ++c) {
      const Packet<T> share = pset1<Packet<T>>(factor[c]);
      for (T* o = value + c * width; o < value + (c + 1) * width; o += lanes<T>) {
        pstoreu(o, pmul(ploadu<Packet<T>>(o), share));
      }
    }
    transpose(value, width, value_dim, count, T(1), out, out_stride, store, sum);
  }

 private:
  // Turns vectors of scores into weights 2^(score - shift), and adds these to the total.
  NEARFAR_INLINE static void weigh(T* scores, const Packet<T>& shift, Packet<T>& total) {
    Packet<T> weight[weights_at_once];
    NEARFAR_UNROLL for (int i = 0; i < weights_at_once; ++i) weight[i] =
        psub(ploadu<Packet<T>>(scores + i * width), shift);
    exp2<T>(weight);
    NEARFAR_UNROLL for (int i = 0; i < weights_at_once; ++i) {
      pstoreu(scores + i * width, weight[i]);
      total = padd(total, weight[i]);
    }
  }
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
