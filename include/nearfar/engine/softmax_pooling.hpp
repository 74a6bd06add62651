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
inline constexpr Index pooling_tile = 3 * row_block;

/// How many rows ahead memory is asked for.
inline constexpr Index prefetch_rows = 4 * row_block;

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

/// to[i] = the sum over the lanes of vectors[i]. Several sums at once are cheaper than one by one: after a
/// transposition they are sums of whole vectors.
template <int Count, class P, class T>
NEARFAR_INLINE void sum_lanes(const P (&vectors)[Count], T* to) {
  constexpr int width = Eigen::internal::unpacket_traits<P>::size;
  if constexpr (Count >= 4 && width == 2 * Count) {
    typename Eigen::internal::unpacket_traits<P>::half halves[Count];
    NEARFAR_UNROLL for (int i = 0; i < Count; ++i) halves[i] = Eigen::internal::predux_half_dowto4(vectors[i]);
    sum_lanes(halves, to);
  } else if constexpr (width > 1 && Count % width == 0) {
    NEARFAR_UNROLL for (int first = 0; first < Count; first += width) {
      Eigen::internal::PacketBlock<P, width> block;
      NEARFAR_UNROLL for (int i = 0; i < width; ++i) block.packet[i] = vectors[first + i];
      ptranspose(block);
      P sum = block.packet[0];
      NEARFAR_UNROLL for (int i = 1; i < width; ++i) sum = padd(sum, block.packet[i]);
      pstoreu(to + first, sum);
    }
  } else {
    NEARFAR_UNROLL for (int i = 0; i < Count; ++i) to[i] = predux(vectors[i]);
  }
}

/// How the kernels want weights: those of each block of heads side by side, vector by vector (then number by number, in
/// the columns that fill no vector), so that one pointer walks them. Heads that see their own columns alone need
/// nothing of the kind. visit(place, h, c) is called for all places in order.
template <class T, class Visit>
void for_each_interleaved(const PoolingShape& shape, Visit&& visit) {
  const Index cols = shape.cols();
  const Index in_vectors = cols / lanes<T> * lanes<T>;
  Index place = 0;
  for (Index first = 0; first < shape.padded(); first += head_block) {
    for (Index c = 0; c < cols; c += c < in_vectors ? lanes<T> : 1) {
      for (Index h = first; h < first + head_block; ++h) {
        for (Index i = c; i < (c < in_vectors ? c + lanes<T> : c + 1); ++i) visit(place++, h, i);
      }
    }
  }
}

template <class T>
const T* interleave(const PoolingShape& shape, const T* weights, Scratch& scratch) {
  if (shape.own_columns) return weights;
  T* const to = scratch.take<T>(shape.padded() * shape.cols());
  for_each_interleaved<T>(shape, [&](Index place, Index h, Index c) { to[place] = weights[h * shape.cols() + c]; });
  return to;
}

template <class T>
void undo_interleave(const PoolingShape& shape, const T* interleaved, T* weights) {
  if (shape.own_columns) {
    std::copy_n(interleaved, shape.padded() * shape.cols(), weights);
  } else {
    for_each_interleaved<T>(shape,
                            [&](Index place, Index h, Index c) { weights[h * shape.cols() + c] = interleaved[place]; });
  }
}

/// scores(r, h) = weights(h) . rows[r] over `cols` columns, for `Rows` rows and `Heads` heads at once. Meanwhile asks
/// for what lies `ahead` numbers behind the rows.
template <int Rows, int Heads, class T>
NEARFAR_INLINE void score_block(const T* const (&rows)[Rows], Index ahead, const T* weights, Index cols, T* scores,
                                Index padded) {
  Packet<T> sum[Rows][Heads];
  NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
    NEARFAR_UNROLL for (int h = 0; h < Heads; ++h) sum[r][h] = pset1<Packet<T>>(T(0));
  }
  Index c = 0;
  for (; c + lanes<T> <= cols; c += lanes<T>) {
    Packet<T> x[Rows];
    NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
      x[r] = ploadu<Packet<T>>(rows[r] + c);
      prefetch_far(rows[r] + c + ahead);
    }
    NEARFAR_UNROLL for (int h = 0; h < Heads; ++h, weights += lanes<T>) {
      Packet<T> w = ploadu<Packet<T>>(weights);
      // Without it a compiler may read w from memory once for each row: the loads would outweigh the multiply-adds.
      EIGEN_OPTIMIZATION_BARRIER(w)
      NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) sum[r][h] = pmadd(x[r], w, sum[r][h]);
    }
  }
  NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
    Packet<T> row[Heads];
    NEARFAR_UNROLL for (int h = 0; h < Heads; ++h) row[h] = sum[r][h];
    sum_lanes(row, scores + r * padded);
  }
  for (; c < cols; ++c, weights += Heads) {
    for (int r = 0; r < Rows; ++r) {
      for (int h = 0; h < Heads; ++h) scores[r * padded + h] += rows[r][c] * weights[h];
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

/// scores(i, h) = w_h . x_i for the rows [first, first + count) of the list. `weights` are interleaved, unless heads
/// see their own columns alone.
template <class T>
void score_rows(const PoolingShape& shape, const T* weights, const RowList<const T>& list, Index first, Index count,
                T* scores) {
  const Index padded = shape.padded();
  if (shape.own_columns) std::fill_n(scores, count * padded, T(0));
  for_each_head_block(shape, [&](auto block, Index h, Index column, Index cols) {
    constexpr int heads = decltype(block)::value;
    const T* const w = weights + h * shape.cols() + column;
    const auto score = [&](auto several, Index i) {
      constexpr int rows = decltype(several)::value;
      const T* now[rows];
      for (int r = 0; r < rows; ++r) now[r] = list[first + i + r] + column;
      const Index later = list.number[std::min(first + i + prefetch_rows, list.count - 1)];
      const Index ahead = (later - list.number[first + i]) * list.rows.stride();
      score_block<rows, heads>(now, ahead, w, cols, scores + i * padded + h, padded);
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

/// Shows the rows of the list to the pooling, with interleaved weights. `scores` (shape.scores(list.count) numbers) is
/// left holding the scores.
template <class T>
void pool(const PoolingShape& shape, const T* weights, const RowList<const T>& list, T* scores, SoftmaxPool<T> state,
          Scratch& scratch) {
  const Scratch::Scope scope(scratch);
  const Index padded = shape.padded();
  using P = typename Eigen::internal::find_best_packet<T, head_block>::type;
  constexpr int width = Eigen::internal::unpacket_traits<P>::size;
  T* const share = scratch.take<T>(shape.scores<T>(pooling_tile + 1));
  for (Index first = 0; first < list.count; first += pooling_tile) {
    const Index count = std::min(pooling_tile, list.count - first);
    T* const score = scores + first * padded;
    T* const keep = share + count * padded;
    score_rows(shape, weights, list, first, count, score);

    // The old mean keeps sum' / sum of its weight, and row i gets 2^(score_i - max) / sum.
    for (Index h = 0; h < padded; h += width) {
      const P old = ploadu<P>(state.max + h);
      P larger = old;
      for (Index i = 0; i < count; ++i) larger = pmax(larger, ploadu<P>(score + i * padded + h));
      pstoreu(state.max + h, larger);
      const P none = pset1<P>(-infinity<T>);
      const P shift = pselect(pcmp_eq(larger, none), pset1<P>(T(0)), larger);
      for (Index i = 0; i < count; ++i) {
        pstoreu(share + i * padded + h, psub(ploadu<P>(score + i * padded + h), shift));
      }
      pstoreu(keep + h, psub(old, shift));
    }
    exp2_in_place(share, (count + 1) * padded);
    for (Index h = 0; h < padded; h += width) {
      const P old = pmul(ploadu<P>(state.sum + h), ploadu<P>(keep + h));
      P sum = old;
      for (Index i = 0; i < count; ++i) sum = padd(sum, ploadu<P>(share + i * padded + h));
      pstoreu(state.sum + h, sum);
      const P zero = pset1<P>(T(0));
      const P inverse = pselect(pcmp_eq(sum, zero), zero, Eigen::internal::pdiv(pset1<P>(T(1)), sum));
      for (Index i = 0; i <= count; ++i) {
        const P weight = i < count ? ploadu<P>(share + i * padded + h) : old;
        pstoreu(share + i * padded + h, pmul(weight, inverse));
      }
    }
    const T* rows[pooling_tile];
    for (Index i = 0; i < count; ++i) rows[i] = list[first + i];
    for (Index h = 0; h < shape.heads; ++h) {
      constexpr int vectors = 4;
      const auto columns = [&](auto by, auto several, Index c) {
        using V = typename decltype(by)::template Of<T>;
        blend<V, several>(rows, count, share + h, padded, keep[h], shape.column(h) + c, state.mean + h * shape.dim + c);
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

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
