#pragma once

#include <nearfar/engine/additive/call.hpp>
#include <nearfar/engine/additive/softmax_pooling_backward.hpp>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// Bidirectional additive attention. One gq serves all tokens of a sequence, so w_k p_i = (w_k gq) k_i and
// gk = gq * sum_i beta_i k_i: with gq folded into w_k, both poolings are softmax poolings of rows as they stand, and
// the rows of out need one more pass over the tokens.

/// w_k folded: row r, column c of key head g is the sum over that head's query heads h of w_k(r, c of h) gq(c of h).
template <class T>
const T* fold_global_query(const AdditiveCall<T>& call, const T* global_query, Scratch& scratch) {
  const PoolingShape shape = call.key_shape();
  T* const folded = scratch.take<T>(shape.padded() * shape.cols());
  std::fill_n(folded, shape.padded() * shape.cols(), T(0));
  for (Index row = 0; row < shape.heads; ++row) {
    for (Index h = 0; h < shape.heads; ++h) {
      T* const to = folded + row * shape.cols() + shape.column(h);
      const Index from = h * shape.dim;
      for (Index c = 0; c < shape.dim; ++c) to[c] += call.w_k[row * call.width() + from + c] * global_query[from + c];
    }
  }
  return folded;
}

/// One pooling of each sequence.
template <class T>
struct SequencePools {
  PoolingShape shape;
  T* pools;
  T* means;  ///< sequences x heads' means

  SoftmaxPool<T> operator[](Index b) const {
    return SoftmaxPool<T>::at(pools + b * SoftmaxPool<T>::size(shape), shape);
  }
  T* mean(Index b) const { return means + b * shape.width(); }
};

/// Pools each sequence's visible rows with the weights that weights_of(sequence, scratch) gives. `scores`, unless null,
/// gets the scores of each token.
template <class T>
SequencePools<T> pool_sequences(const AdditiveCall<T>& call, const PoolingShape& shape, Tokens<const T> rows,
                                FunctionRef<const T*(Index, Scratch&)> weights_of, Matrix<T>* scores) {
  const Stretches& stretches = call.stretches;
  const Index size = SoftmaxPool<T>::size(shape);
  const SequencePools<T> parts{shape, call.work.template take<T>(stretches.count() * size), nullptr};
  const SequencePools<T> all{shape, call.work.template take<T>(stretches.sequences() * size),
                             call.work.template take<T>(stretches.sequences() * shape.width())};
  call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
    parts[s].start(shape);
    const T* const weights = interleave<T>(shape, weights_of(stretches[s].sequence, scratch),
                                           [&](Index count) { return scratch.take<T>(count); });
    constexpr Index block = 64;
    T* const score = scratch.take<T>(shape.scores<T>(block));
    const auto block_of = [&](const Stretch& stretch, Index first) {
      return rows.middle_rows(first, std::min(block, stretch.end() - first));
    };
    const Stretch stretch = stretches[s];
    const Stretch next = call.after(s);
    for (Index first = stretch.first, end; first < stretch.end(); first = end) {
      end = std::min(first + block, stretch.end());
      Index token[block];
      Index count = 0;
      for (Index i = first; i < end; ++i) {
        if (call.sees(i)) token[count++] = i;
      }
      Lookahead ahead;
      ahead.add(end < stretch.end() ? block_of(stretch, end) : block_of(next, next.first));
      Spread fetch(ahead, shape.fetches<T>(count));
      pool<T>(
          shape, weights, count, [&](Index i) { return rows.row(token[i]); }, score, parts[s], fetch, scratch);
      for (Index i = 0; i < count && scores != nullptr; ++i) {
        std::copy_n(score + i * shape.padded(), shape.padded(), scores->row(token[i]).data());
      }
    }
  });
  call.work.for_each(stretches.sequences(), [&](Index b, Scratch&) {
    all[b].start(shape);
    for (Index s = stretches.of(b).first; s < stretches.of(b).end; ++s) all[b].merge(parts[s], shape);
    all[b].means(shape, all.mean(b));
  });
  return all;
}

/// Turns the scores of a stretch's visible tokens into their softmax weights.
template <class T>
void scores_to_weights(const AdditiveCall<T>& call, const Stretch& stretch, const SoftmaxPool<T>& pool,
                       Matrix<T>& scores) {
  for (Index i = stretch.first; i < stretch.end(); ++i) {
    if (!call.sees(i)) continue;
    for (Index h = 0; h < call.heads.query; ++h) {
      scores(i, h) = std::exp2(scores(i, h) - pool.max[h]) / pool.sum[h];
    }
  }
}

template <class T>
void additive_global(const AdditiveCall<T>& call, const AdditiveOut<T>& out) {
  const Index width = call.width();
  AdditiveSaved<T>* const saved = out.saved;
  const SequencePools<T> queries = pool_sequences<T>(
      call, call.query_shape(), call.inputs.query, [&](Index, Scratch&) { return call.w_q; },
      saved == nullptr ? nullptr : &saved->query_weights);
  const SequencePools<T> keys = pool_sequences<T>(
      call, call.key_shape(), call.inputs.key,
      [&](Index b, Scratch& scratch) { return fold_global_query(call, queries.mean(b), scratch); },
      saved == nullptr ? nullptr : &saved->key_weights);

  call.work.for_each(call.stretches.count(), [&](Index s, Scratch& scratch) {
    const Stretch stretch = call.stretches[s];
    const Index b = stretch.sequence;
    T* const global_key = scratch.take<T>(width);
    for (Index c = 0; c < width; ++c) global_key[c] = queries.mean(b)[c] * keys.mean(b)[c];
    const bool seen = keys[b].sum[0] != T(0);
    for (Index first = stretch.first; first < stretch.end(); first += transform_rows) {
      write_rows<T>(call, out, first, std::min(transform_rows, stretch.end() - first), scratch,
                    [&](Index) { return seen ? global_key : nullptr; });
    }
    if (saved == nullptr) return;
    scores_to_weights(call, stretch, queries[b], saved->query_weights);
    scores_to_weights(call, stretch, keys[b], saved->key_weights);
  });
  for (Index b = 0; saved != nullptr && b < call.stretches.sequences(); ++b) {
    std::copy_n(queries.mean(b), width, saved->query_means.row(b).data());
    std::copy_n(keys.mean(b), width, saved->key_means.row(b).data());
  }
}

/// The gradient of pool_sequences: grad_rows = start (zero where it has no rows) + what reaches the rows through the
/// means and the scores. take(group, s, grad_weights) gets the gradient of the weights of each stretch s; those of a
/// group come one after another.
template <class T, class WeightsOf, class Take>
void pool_sequences_backward(const AdditiveCall<T>& call, const PoolingShape& shape, Tokens<const T> rows,
                             WeightsOf&& weights_of, const Matrix<T>& token_weights, const Matrix<T>& means,
                             const T* grad_means, Tokens<const T> start, Tokens<T> grad_rows, Take&& take) {
  const Stretches& stretches = call.stretches;
  const Index size = shape.padded() * shape.cols();
  const auto differentiate = [&](Index group, Index s, Index then, Scratch& scratch) {
    const Scratch::Scope scope(scratch);
    const Stretch stretch = stretches[s];
    const T* const grad_mean = grad_means + stretch.sequence * shape.width();
    const T* const weights = weights_of(stretch.sequence, scratch);
    T* const center = scratch.take<T>(shape.padded());
    // The means stand head by head, as one row of as many heads of their own.
    dot_heads(PoolingShape{shape.heads, shape.dim}, means.row(stretch.sequence).data(), grad_mean, center);
    T* const grad_weights = scratch.take<T>(size);
    std::fill_n(grad_weights, size, T(0));
    for_each_run(
        stretch.first, stretch.end(), [&](Index token) { return call.sees(token); },
        [&](Index first, Index count) {
          pool_backward(shape, weights, rows, first, count, first + count < stretch.end() ? first + count : then,
                        token_weights, center, grad_mean, start, grad_rows, grad_weights, scratch);
        },
        [&](Index token) {
          if (start.data() == nullptr) {
            std::fill_n(grad_rows.row(token), shape.cols(), T(0));
          } else {
            std::copy_n(start.row(token), shape.cols(), grad_rows.row(token));
          }
        });
    take(group, s, grad_weights);
  };
  call.work.for_each(stretches.groups(), [&](Index group, Scratch& scratch) {
    const Range own = stretches.group(group);
    const Index next = call.work.likely_next(group);
    const Index after = next < stretches.groups() ? stretches[stretches.group(next).first].first : 0;
    for (Index s = own.first; s < own.end; ++s) {
      differentiate(group, s, s + 1 < own.end ? stretches[s + 1].first : after, scratch);
    }
  });
}

/// The gradient of fold_global_query, from that of the folded weights: writes that of the global query, and adds to
/// that of w_k (padded heads x width).
template <class T>
void fold_backward(const AdditiveCall<T>& call, const T* global_query, const T* grad_folded, T* grad_global_query,
                   T* grad_w_k) {
  const PoolingShape shape = call.key_shape();
  const Index width = call.width();
  std::fill_n(grad_global_query, width, T(0));
  for (Index row = 0; row < shape.heads; ++row) {
    for (Index h = 0; h < shape.heads; ++h) {
      const T* const grad = grad_folded + row * shape.cols() + shape.column(h);
      for (Index c = 0, at = h * shape.dim; c < shape.dim; ++c, ++at) {
        grad_global_query[at] += call.w_k[row * width + at] * grad[c];
        grad_w_k[row * width + at] += global_query[at] * grad[c];
      }
    }
  }
}

template <class T>
void additive_global_backward(const AdditiveCall<T>& call, const AdditiveGradients<T>& grad) {
  const Index width = call.width();
  const Stretches& stretches = call.stretches;
  const AdditiveSaved<T>& saved = grad.saved;
  Work& work = call.work;
  T* const global_keys = work.take<T>(stretches.sequences() * width);
  T* const parts = work.take<T>(stretches.count() * width);
  T* const grad_mean_keys = work.take<T>(stretches.sequences() * width);
  T* const grad_global_queries = work.take<T>(stretches.sequences() * width);
  const Index weights = call.query_shape().padded() * width;
  T* const weight_parts = work.take<T>(stretches.groups() * weights);
  for (Index b = 0; b < stretches.sequences(); ++b) {
    for (Index c = 0; c < width; ++c) global_keys[b * width + c] = saved.query_means(b, c) * saved.key_means(b, c);
  }

  work.for_each(stretches.count(), [&](Index s, Scratch&) {
    const T* const global_key = global_keys + stretches[s].sequence * width;
    T* const grad_global_key = parts + s * width;
    std::fill_n(grad_global_key, width, T(0));
    with_store(rows_past_caches(grad.inputs.value, call.heads.dim), [&](auto store) {
      for (Index token = stretches[s].first; token < stretches[s].end(); ++token) {
        T* const grad_value = grad.inputs.value.row(token);
        if (reads_value(call, grad, token)) {
          blend_row_backward(call.heads, global_key, call.inputs.value.row(token), grad.u.row(token), grad_value, true,
                             grad_global_key, store);
        } else {
          std::fill_n(grad_value, call.heads.value_cols(), T(0));
        }
      }
    });
  });
  if (grad.w_t.data() != nullptr) {
    transform_weights_backward(call, grad, [&](Index token, const Stretch& stretch, Index first, Index count, T* u) {
      const bool read = reads_value(call, grad, token);
      const T* const global_key = global_keys + stretch.sequence * width;
      const T* const value = call.inputs.value.row(token);
      for (Index i = 0, c = first; i < count; ++i, ++c) {
        u[i] = read ? global_key[c] * value[call.key_shape().column(c / call.heads.dim) + c % call.heads.dim] : T(0);
      }
    });
  }

  const auto sum_of_parts = [&](Index b, Index c) {
    T sum = T(0);
    for (Index s = stretches.of(b).first; s < stretches.of(b).end; ++s) sum += parts[s * width + c];
    return sum;
  };
  // gk = gq * mean_key.
  for (Index b = 0; b < stretches.sequences(); ++b) {
    for (Index c = 0; c < width; ++c) {
      const T sum = sum_of_parts(b, c);
      grad_global_queries[b * width + c] = sum * saved.key_means(b, c);
      grad_mean_keys[b * width + c] = sum * saved.query_means(b, c);
    }
  }
  std::fill_n(weight_parts, stretches.groups() * weights, T(0));
  pool_sequences_backward(
      call, call.key_shape(), call.inputs.key,
      [&](Index b, Scratch& scratch) { return fold_global_query(call, saved.query_means.row(b).data(), scratch); },
      saved.key_weights, saved.key_means, grad_mean_keys, {}, grad.inputs.key,
      [&](Index group, Index s, const T* grad_folded) {
        fold_backward(call, saved.query_means.row(stretches[s].sequence).data(), grad_folded, parts + s * width,
                      weight_parts + group * weights);
      });
  sum_weight_gradients(call, weight_parts, stretches.groups(), grad.w_k);
  for (Index b = 0; b < stretches.sequences(); ++b) {
    for (Index c = 0; c < width; ++c) grad_global_queries[b * width + c] += sum_of_parts(b, c);
  }
  std::fill_n(weight_parts, stretches.groups() * weights, T(0));
  pool_sequences_backward(
      call, call.query_shape(), call.inputs.query, [&](Index, Scratch&) { return call.w_q; }, saved.query_weights,
      saved.query_means, grad_global_queries, call.add_query ? grad.out : Tokens<const T>{}, grad.inputs.query,
      [&](Index group, Index, const T* grad_weights) {
        T* const part = weight_parts + group * weights;
        for (Index i = 0; i < weights; ++i) part[i] += grad_weights[i];
      });
  sum_weight_gradients(call, weight_parts, stretches.groups(), grad.w_q);
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
