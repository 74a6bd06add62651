#pragma once

#include <nearfar/engine/microkernel.hpp>
#include <nearfar/engine/softmax_pooling.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Rows that the backward pass takes at a time: they stay in a cache until all their columns are done.
inline constexpr Index backward_rows = 32;

/// The gradient of scores = x weights^T for `count` rows of x, `stride` numbers apart:
///
///   grad_x_i = base_i + sum_h grad_score_ih w_h            grad_w_h += sum_i grad_score_ih x_i
///
/// base(by, i, key_head, c) gives packets of base_i, and store(i, column, packet) takes those of grad_x_i.
template <class T, class Base, class Store>
void score_rows_backward(const PoolingShape& shape, const T* weights, const T* grad_scores, Index count, const T* x,
                         Index stride, T* grad_weights, Base&& base, Store&& store) {
  const Index padded = shape.padded();
  const Index cols = shape.cols();
  const Index in_vectors = shape.dim / lanes<T> * lanes<T>;
  for (Index g = 0; g < shape.heads / shape.group; ++g) {
    // The heads whose scores see these columns.
    const Index first = shape.own_columns ? g * shape.group : 0;
    const Index heads = shape.own_columns ? shape.group : shape.heads;
    const T* const grad_score = grad_scores + first;
    for_each_panel<T>(in_vectors, [&](auto panel, Index c) {
      constexpr int vectors = decltype(panel)::value;
      const Index at = g * shape.dim + c;
      T* const grad_w = grad_weights + first * cols + at;
      multiply<vectors>(
          Broadcast<T>{grad_score, 1, padded}, heads, x + at, stride, count,
          [&](Index h, int v) { return ploadu<Packet<T>>(grad_w + h * cols + v * lanes<T>); },
          [&](Index h, int v, const Packet<T>& sum) { pstoreu(grad_w + h * cols + v * lanes<T>, sum); });
      multiply<vectors>(
          Broadcast<T>{grad_score, padded, 1}, count, weights + first * cols + at, cols, heads,
          [&](Index i, int v) { return base(ByVectors{}, i, g, c + v * lanes<T>); },
          [&](Index i, int v, const Packet<T>& sum) { store(i, at + v * lanes<T>, sum); });
    });
    for (Index c = in_vectors; c < shape.dim; ++c) {
      const Index at = g * shape.dim + c;
      for (Index i = 0; i < count; ++i) {
        T sum = base(ByNumbers{}, i, g, c);
        for (Index h = 0; h < heads; ++h) {
          sum += grad_score[i * padded + h] * weights[(first + h) * cols + at];
          grad_weights[(first + h) * cols + at] += grad_score[i * padded + h] * x[i * stride + at];
        }
        store(i, at, sum);
      }
    }
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
      for (; c < shape.dim; ++c) rest[h] += a[c] * b[c];
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
/// where start may be empty (zero). Adds to grad_weights. `center` holds mean_h . grad_mean_h; `store` takes vectors to
/// the rows of grad_x.
template <class T, class Store>
void pool_backward(const PoolingShape& shape, const T* weights, Tokens<const T> x, Index first, Index count,
                   const Matrix<T>& weights_of_rows, const T* center, const T* grad_mean, Tokens<const T> start,
                   Tokens<T> grad_x, T* grad_weights, Store&& store, Scratch& scratch) {
  const Scratch::Scope scope(scratch);
  const Index padded = shape.padded();
  T* const grad_scores = scratch.take<T>(backward_rows * padded);
  for (const Index end = first + count; first < end; first += backward_rows) {
    const Index rows = std::min(backward_rows, end - first);
    for (Index i = 0; i < rows; ++i) {
      const T* const later = later_row(x, first + i);
      const T* const later_start = start.data() == nullptr ? later : start.row(first + i);
      for (Index c = 0; c < shape.cols(); c += 64 / Index{sizeof(T)}) {
        prefetch_far(later + c);
        prefetch_far(later_start + c);
      }
      T* const grad_score = grad_scores + i * padded;
      dot_heads(shape, x.row(first + i), grad_mean, grad_score);
      const T* const weight = weights_of_rows.row(first + i).data();
      for (Index h = 0; h < shape.heads; ++h) grad_score[h] = ln_2<T> * weight[h] * (grad_score[h] - center[h]);
    }
    score_rows_backward(
        shape, weights, grad_scores, rows, x.row(first), x.stride(), grad_weights,
        [&](auto by, Index i, Index g, Index c) {
          using P = typename decltype(by)::template Of<T>;
          P sum = start.data() == nullptr ? pset1<P>(T(0)) : ploadu<P>(start.row(first + i) + g * shape.dim + c);
          const T* const weight = weights_of_rows.row(first + i).data();
          for (Index h = g * shape.group; h < (g + 1) * shape.group; ++h) {
            sum = pmadd(pset1<P>(weight[h]), ploadu<P>(grad_mean + h * shape.dim + c), sum);
          }
          return sum;
        },
        [&](Index i, Index c, const auto& sum) { store(grad_x.row(first + i) + c, sum); });
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
