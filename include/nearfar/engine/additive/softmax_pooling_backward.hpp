#pragma once

#include <nearfar/detail/stores.hpp>
#include <nearfar/engine/additive/softmax_pooling.hpp>
#include <nearfar/engine/microkernel.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Rows that the backward pass takes at a time: they stay in a cache until all their columns are done.
inline constexpr Index backward_rows = 32;

/// Its products fetch every so many inner steps.
inline constexpr Index backward_pace = 2;

/// What reaches rows through the means of their own columns: sum_h weight_ih grad_mean_h. Null weights: nothing does.
template <class T>
struct MeanShares {
  const T* weights = nullptr;  ///< of row i and head h at [i * stride + h]
  Index stride = 0;
  const T* grad_means = nullptr;  ///< heads x dim

  MeanShares from_head(Index h, Index dim) const {
    return weights == nullptr ? *this : MeanShares{weights + h, stride, grad_means + h * dim};
  }

  /// `sum` and what reaches row i, from column c on, through the means of the group of heads that begins here.
  template <class P>
  NEARFAR_INLINE P add(Index i, Index c, const PoolingShape& shape, P sum) const {
    for (Index h = 0; h < shape.group && weights != nullptr; ++h) {
      sum = pmadd(pset1<P>(weights[i * stride + h]), ploadu<P>(grad_means + h * shape.dim + c), sum);
    }
    return sum;
  }
};

/// What the gradients of rows start from: the sum of the rows of two matrices, either of which may be empty (zero).
template <class T>
struct StartRows {
  Tokens<const T> rows;
  Tokens<const T> more_rows = {};

  template <class P>
  NEARFAR_INLINE P at(Index i, Index c) const {
    const P start = rows.data() == nullptr ? pset1<P>(T(0)) : ploadu<P>(rows.row(i) + c);
    return more_rows.data() == nullptr ? start : P(padd(start, ploadu<P>(more_rows.row(i) + c)));
  }
};

/// grad_x_i = start_i + sum_h weight_ih grad_mean_h: what does not reach rows through their scores.
template <class T>
void start_rows_backward(const PoolingShape& shape, const MeanShares<T>& mean_shares, const StartRows<T>& start,
                         Tokens<T> grad_x) {
  for (Index i = 0; i < grad_x.rows(); ++i) {
    for (Index g = 0; g < shape.heads / shape.group; ++g) {
      const MeanShares<T> shares = mean_shares.from_head(g * shape.group, shape.dim);
      for_each_packet<T>(shape.dim, [&](auto by, Index c) {
        using P = typename decltype(by)::template Of<T>;
        const Index at = g * shape.dim + c;
        pstoreu(grad_x.row(i) + at, shares.add(i, c, shape, start.template at<P>(i, at)));
      });
    }
  }
}

/// How often score_rows_backward fetches for `rows` rows.
template <class T>
Index score_fetches(const PoolingShape& row_shape, Index rows) {
  const PoolingShape shape = row_shape.of_scores<T>();
  const Index heads = shape.per_head_weights ? shape.group : shape.heads;
  const Index panels = shape.heads / shape.group * ceil_div(shape.dim / lanes<T>, 2);
  const auto products = [&](Index count, Index depth) {
    return ceil_div(count, tile_rows<2>) * ceil_div(depth, backward_pace);
  };
  return panels * (products(heads, rows) + products(rows, heads));
}

/// The gradient of scores = x weights^T for a few rows of x:
///
///   grad_x_i = start_i + sum_h weight_ih grad_mean_h + sum_h grad_score_ih w_h
///   grad_w_h += sum_i grad_score_ih x_i
///
/// `start` may be the rows of grad_x. These are written a few at a time, from their first column to their last, vectors
/// by store(to, packet). Meanwhile fetches.
template <class T>
void score_rows_backward(const PoolingShape& shape, const T* weights, const T* grad_scores, Tokens<const T> x,
                         T* grad_weights, const MeanShares<T>& mean_shares, const StartRows<T>& start, Tokens<T> grad_x,
                         KeepOrPastCaches store, Spread& fetch) {
  if (const PoolingShape whole = shape.of_scores<T>(); whole.dim != shape.dim) {
    start_rows_backward(shape, mean_shares, start, grad_x);
    return score_rows_backward<T>(whole, weights, grad_scores, x, grad_weights, {}, {grad_x}, grad_x, store, fetch);
  }

  const Index count = x.rows();
  const Index padded = shape.padded();
  const Index cols = shape.cols();
  const Index in_vectors = shape.dim / lanes<T> * lanes<T>;
  const Index groups = shape.heads / shape.group;
  const auto shares_of = [&](Index g) { return mean_shares.from_head(g * shape.group, shape.dim); };
  // The heads whose scores see the columns of group g.
  const auto first_head = [&](Index g) { return shape.per_head_weights ? g * shape.group : 0; };
  const Index heads = shape.per_head_weights ? shape.group : shape.heads;
  for (Index g = 0; g < groups; ++g) {
    for_each_panel<T>(in_vectors, [&](auto panel, Index c) {
      const Index at = g * shape.dim + c;
      T* const grad_w = grad_weights + first_head(g) * cols + at;
      multiply<decltype(panel)::value>(
          Broadcast<T>{grad_scores + first_head(g), 1, padded}, heads, x.data() + at, x.stride(), count,
          [&](Index h, int v) { return ploadu<Packet<T>>(grad_w + h * cols + v * lanes<T>); },
          [&](Index h, int v, const Packet<T>& sum) { pstoreu(grad_w + h * cols + v * lanes<T>, sum); },
          Pace{fetch, backward_pace});
    });
  }
  for_each_tile<2>(count, [&](auto tile, Index i) {
    constexpr int rows = decltype(tile)::value;
    for (Index g = 0; g < groups; ++g) {
      const MeanShares<T> shares = shares_of(g);
      for_each_panel<T>(in_vectors, [&](auto panel, Index c) {
        constexpr int vectors = decltype(panel)::value;
        const Index at = g * shape.dim + c;
        Packet<T> sum[rows][vectors];
        NEARFAR_UNROLL for (int r = 0; r < rows; ++r) {
          NEARFAR_UNROLL for (int v = 0; v < vectors; ++v) {
            sum[r][v] = start.template at<Packet<T>>(i + r, at + v * lanes<T>);
          }
        }
        if (shares.weights != nullptr) {
          multiply_add(sum, Broadcast<T>{shares.weights, shares.stride, 1}.rows_from(i), shares.grad_means + c,
                       shape.dim, shape.group);
        }
        multiply_add(sum, Broadcast<T>{grad_scores + first_head(g), padded, 1}.rows_from(i),
                     weights + first_head(g) * cols + at, cols, heads, Pace{fetch, backward_pace});
        NEARFAR_UNROLL for (int r = 0; r < rows; ++r) {
          T* const to = grad_x.row(i + r) + at;
          NEARFAR_UNROLL for (int v = 0; v < vectors; ++v) store(to + v * lanes<T>, sum[r][v]);
        }
      });
    }
  });
  for (Index g = 0; g < groups; ++g) {
    for_each_packet<T>(
        shape.dim,
        [&, shares = shares_of(g)](auto by, Index c) {
          using P = typename decltype(by)::template Of<T>;
          const Index at = g * shape.dim + c;
          for (Index i = 0; i < count; ++i) {
            const P row = ploadu<P>(x.row(i) + at);
            P sum = shares.add(i, c, shape, start.template at<P>(i, at));
            for (Index h = first_head(g); h < first_head(g) + heads; ++h) {
              const P grad_score = pset1<P>(grad_scores[i * padded + h]);
              T* const grad_w = grad_weights + h * cols + at;
              sum = pmadd(grad_score, ploadu<P>(weights + h * cols + at), sum);
              pstoreu(grad_w, pmadd(grad_score, row, ploadu<P>(grad_w)));
            }
            pstoreu(grad_x.row(i) + at, sum);
          }
        },
        in_vectors);
  }
}

/// products[h] = x[columns of head h] . y[head h] for all heads (padded).
template <class T>
void dot_heads(const PoolingShape& shape, const T* x, const T* y, T* products) {
  for (Index first = 0; first < shape.padded(); first += head_block) {
    const Index heads = std::min<Index>(head_block, shape.heads - first);
    Packet<T> sum[head_block];
    T rest[head_block] = {};
    for (int h = 0; h < head_block; ++h) sum[h] = pset1<Packet<T>>(T(0));
    for (Index h = 0; h < heads; ++h) {
      const T* const a = x + shape.column(first + h);
      const T* const b = y + (first + h) * shape.dim;
      Index c = 0;
      for (; c + lanes<T> <= shape.dim; c += lanes<T>) {
        sum[h] = pmadd(ploadu<Packet<T>>(a + c), ploadu<Packet<T>>(b + c), sum[h]);
      }
      for_each_packet<T>(
          shape.dim,
          [&](auto by, Index at) {
            using P = typename decltype(by)::template Of<T>;
            rest[h] += predux(pmul(ploadu<P>(a + at), ploadu<P>(b + at)));
          },
          c);
    }
    sum_vectors(sum, products + first);
    for (int h = 0; h < head_block; ++h) products[first + h] += rest[h];
  }
}

/// The gradient of `pool` for the rows [first, first + count), all shown to it, whose weights stand in the rows of
/// `weights_of_rows`: grad_score_ih = weight_ih (x_i - mean_h) . grad_mean_h, and
///
///   grad_x_i = start_i + sum_h weight_ih grad_mean_h + what reaches it through its scores
///
/// where start may be empty (zero). Adds to grad_weights. `center` holds mean_h . grad_mean_h. `then` is the row that
/// is likely wanted after these.
template <class T>
void pool_backward(const PoolingShape& shape, const T* weights, Tokens<const T> x, Index first, Index count, Index then,
                   const Matrix<T>& weights_of_rows, const T* center, const T* grad_mean, Tokens<const T> start,
                   Tokens<T> grad_x, T* grad_weights, Scratch& scratch) {
  const Scratch::Scope scope(scratch);
  const Index padded = shape.padded();
  T* const grad_scores = scratch.take<T>(backward_rows * padded);
  with_store(rows_past_caches(grad_x, shape.dim), [&](auto store) {
    for (const Index end = first + count; first < end; first += backward_rows) {
      const Index rows = std::min(backward_rows, end - first);
      const Index next = first + rows < end ? first + rows : then;
      const Index next_rows = std::min(backward_rows, x.rows() - next);
      Lookahead ahead;
      ahead.add(x.middle_rows(next, next_rows));
      if (start.data() != nullptr) ahead.add(start.middle_rows(next, next_rows));
      if (!store.past) ahead.add(grad_x.middle_rows(next, next_rows));
      Spread fetch(ahead, rows + score_fetches<T>(shape, rows));
      for (Index i = 0; i < rows; ++i) {
        T* const grad_score = grad_scores + i * padded;
        fetch();
        dot_heads(shape, x.row(first + i), grad_mean, grad_score);
        const T* const weight = weights_of_rows.row(first + i).data();
        for (Index h = 0; h < shape.heads; ++h) grad_score[h] = ln_2<T> * weight[h] * (grad_score[h] - center[h]);
      }
      score_rows_backward<T>(shape, weights, grad_scores, x.middle_rows(first, rows), grad_weights,
                             MeanShares<T>{weights_of_rows.row(first).data(), weights_of_rows.cols(), grad_mean},
                             StartRows<T>{start.middle_rows(first, rows)}, grad_x.middle_rows(first, rows), store,
                             fetch);
    }
  });
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
