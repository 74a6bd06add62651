#pragma once

#include <nearfar/engine/softmax_pooling.hpp>

#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Rows that the backward pass takes at a time: they stay in the first-level cache.
inline constexpr Index pooling_tile = 3 * row_block;

/// grad[r] += sum_h grad_scores(r, h) weights(h) and grad_weights(h) += sum_r grad_scores(r, h) x[r], over `cols`
/// columns.
template <int Rows, int Heads, class T>
NEARFAR_INLINE void score_block_backward(const T* const (&x)[Rows], T* const (&grad)[Rows], const T* grad_scores,
                                         Index padded, const T* weights, T* grad_weights, Index cols) {
  Packet<T> score[Rows][Heads];
  NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
    NEARFAR_UNROLL for (int h = 0; h < Heads; ++h) score[r][h] = pset1<Packet<T>>(grad_scores[r * padded + h]);
  }
  Index c = 0;
  for (; c + lanes<T> <= cols; c += lanes<T>, weights += Heads * lanes<T>, grad_weights += Heads * lanes<T>) {
    Packet<T> row[Rows];
    Packet<T> sum[Rows];
    NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
      row[r] = ploadu<Packet<T>>(x[r] + c);
      sum[r] = ploadu<Packet<T>>(grad[r] + c);
    }
    NEARFAR_UNROLL for (int h = 0; h < Heads; ++h) {
      const Packet<T> w = ploadu<Packet<T>>(weights + h * lanes<T>);
      Packet<T> grad_w = ploadu<Packet<T>>(grad_weights + h * lanes<T>);
      NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
        sum[r] = pmadd(score[r][h], w, sum[r]);
        grad_w = pmadd(score[r][h], row[r], grad_w);
      }
      pstoreu(grad_weights + h * lanes<T>, grad_w);
    }
    NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) pstoreu(grad[r] + c, sum[r]);
  }
  for (; c < cols; ++c, weights += Heads, grad_weights += Heads) {
    for (int r = 0; r < Rows; ++r) {
      for (int h = 0; h < Heads; ++h) {
        grad[r][c] += grad_scores[r * padded + h] * weights[h];
        grad_weights[h] += grad_scores[r * padded + h] * x[r][c];
      }
    }
  }
}

/// The gradient of scores = rows weights^T: grad_row_i += sum_h grad_score_ih w_h for the rows listed in `grad_rows`,
/// and grad_weights_h += sum_i grad_score_ih x_i. Both weights are interleaved.
template <class T>
void score_rows_backward(const PoolingShape& shape, const T* weights, const RowList<const T>& list,
                         const T* grad_scores, const RowList<T>& grad_rows, T* grad_weights) {
  constexpr Index together = 2;
  const Index padded = shape.padded();
  for_each_head_block(shape, [&](auto block, Index h, Index column, Index cols) {
    constexpr int heads = decltype(block)::value;
    const Index at = h * shape.cols() + column;
    const auto several = [&](auto number, Index i) {
      constexpr int rows = decltype(number)::value;
      const T* x[rows];
      T* grad[rows];
      for (int r = 0; r < rows; ++r) {
        x[r] = list[i + r] + column;
        grad[r] = grad_rows[i + r] + column;
      }
      score_block_backward<rows, heads>(x, grad, grad_scores + i * padded + h, padded, weights + at, grad_weights + at,
                                        cols);
    };
    Index i = 0;
    for (; i + together <= list.count; i += together) several(std::integral_constant<int, together>{}, i);
    if (i < list.count) several(std::integral_constant<int, 1>{}, i);
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
      const T* const later = list[std::min(first + i + pooling_tile, list.count - 1)];
      for (Index g = 0; g < groups; ++g) {
        for_each_packet<T>(shape.dim, [&](auto by, Index c) {
          using P = typename decltype(by)::template Of<T>;
          prefetch_far(later + g * shape.dim + c);
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
