#pragma once

#include <nearfar/engine/additive_call.hpp>
#include <nearfar/engine/prefix_pooling.hpp>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// Causal additive attention. Each token has its own gq and gk, prefix means of the queries and of p = gq * k. Stretches
// run side by side: a round of their own poolings tells where each starts, first for the queries, then for the keys,
// whose p need the queries' prefix; a last round writes the rows of out. Each score is computed once.

/// Tokens of a causal stretch: what backward recomputes at a time.
inline constexpr Index prefix_stretch = 128;

/// The visible tokens of a stretch.
struct Visible {
  bool at[prefix_stretch];      // whether token i of the stretch is
  Index token[prefix_stretch];  // their numbers in the batch
  Index row[prefix_stretch];    // and in the stretch
  Index count = 0;

  template <class T>
  Visible(const AdditiveCall<T>& call, const Stretch& stretch) {
    for (Index i = 0; i < stretch.count; ++i) {
      at[i] = call.sees(stretch.first + i);
      if (!at[i]) continue;
      token[count] = stretch.first + i;
      row[count++] = i;
    }
  }
};

/// p_i = gq_i * k_i for the visible tokens, gq_i standing in the rows of p, which it replaces.
template <class T>
void multiply_keys(const AdditiveCall<T>& call, const Visible& visible, Tokens<T> p) {
  const T* const none = nullptr;
  for (Index i = 0; i < visible.count; ++i) {
    T* const row = p.row(visible.row[i]);
    blend_row<T>(call.heads, row, call.inputs.key.row(visible.token[i]), none, row, none, none);
  }
}

/// Turns what each stretch pools into where it starts: the poolings of all stretches before it.
template <class T>
void start_stretches(const AdditiveCall<T>& call, T* pools, T* state) {
  const PoolingShape shape = call.query_shape();
  const Index size = SoftmaxPool<T>::size(shape);
  call.work.for_each(call.stretches.sequences(), [&](Index b, Scratch& scratch) {
    const auto so_far = SoftmaxPool<T>::at(state == nullptr ? scratch.take<T>(size) : state, shape);
    const auto own = SoftmaxPool<T>::at(scratch.take<T>(size), shape);
    if (state == nullptr) so_far.start(shape);
    for (Index s = call.stretches.of(b).first; s < call.stretches.of(b).end; ++s) {
      const auto pool = SoftmaxPool<T>::at(pools + s * size, shape);
      own.copy_from(pool, shape);
      pool.copy_from(so_far, shape);
      so_far.merge(own, shape);
    }
  });
}

template <class T>
void additive_prefix(const AdditiveCall<T>& call, const AdditiveOut<T>& out, T* state) {
  const PoolingShape shape = call.query_shape();
  const Stretches& stretches = call.stretches;
  const Index width = call.width();
  const Index padded = shape.padded();
  const Index size = SoftmaxPool<T>::size(shape);
  const Index scores = shape.scores<T>(prefix_stretch);
  T* const queries = call.work.template take<T>(stretches.count() * size);
  T* const keys = call.work.template take<T>(stretches.count() * size);
  T* const query_scores = call.work.template take<T>(stretches.count() * scores);
  T* const key_scores = call.work.template take<T>(stretches.count() * scores);
  const auto pool_at = [&](T* pools, Index s) { return SoftmaxPool<T>::at(pools + s * size, shape); };

  call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
    const Visible visible(call, stretches[s]);
    const SoftmaxPool<T> own = pool_at(queries, s);
    own.start(shape);
    pool<T>(shape, interleave(shape, call.w_q, scratch), {call.inputs.query, visible.token, visible.count},
            query_scores + s * scores, own, scratch);
  });
  start_stretches(call, queries, state);

  // The prefix means of a stretch's rows from where its pooling starts, leaving weights in place of the scores.
  const auto prefix = [&](Index s, T* pools, T* score, Tokens<const T> rows, const Visible& visible, Tokens<T> means,
                          Scratch& scratch) {
    const Scratch::Scope scope(scratch);
    const SoftmaxPool<T> from = SoftmaxPool<T>::at(scratch.take<T>(size), shape);
    from.copy_from(pool_at(pools, s), shape);
    prefix_weights(shape, score, visible.count, from, scratch);
    prefix_means<T>(shape, score, rows, visible.at, from, means);
  };
  const auto rows_of = [&](Scratch& scratch) {
    return Tokens<T>(scratch.take<T>(prefix_stretch * width), prefix_stretch, width, width);
  };

  // gq_t comes twice, for p is needed twice: the weights are kept in place of the scores the first time.
  call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
    const Stretch& stretch = stretches[s];
    const Visible visible(call, stretch);
    const Tokens<T> p = rows_of(scratch).middle_rows(0, stretch.count);
    prefix(s, queries, query_scores + s * scores, call.inputs.query.middle_rows(stretch.first, stretch.count), visible,
           p, scratch);
    multiply_keys(call, visible, p);
    const SoftmaxPool<T> own = pool_at(keys, s);
    own.start(shape);
    pool<T>(shape, interleave(shape, call.w_k, scratch), {p, visible.row, visible.count}, key_scores + s * scores, own,
            scratch);
  });
  start_stretches(call, keys, state == nullptr ? nullptr : state + size);

  call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
    const Stretch& stretch = stretches[s];
    const Visible visible(call, stretch);
    const Tokens<T> p = rows_of(scratch).middle_rows(0, stretch.count);
    const Tokens<T> global_keys = rows_of(scratch).middle_rows(0, stretch.count);
    const bool seen = pool_at(keys, s).sum[0] != T(0);
    const Index first_seen = seen ? 0 : visible.count > 0 ? visible.row[0] : stretch.count;
    if (out.saved != nullptr) {
      std::copy_n(pool_at(queries, s).mean, width, out.saved->query_means.row(s).data());
      std::copy_n(pool_at(keys, s).mean, width, out.saved->key_means.row(s).data());
    }
    const SoftmaxPool<T> query = pool_at(queries, s);
    prefix_means<T>(shape, query_scores + s * scores, call.inputs.query.middle_rows(stretch.first, stretch.count),
                    visible.at, query, p);
    multiply_keys(call, visible, p);
    prefix(s, keys, key_scores + s * scores, p, visible, global_keys, scratch);
    for (Index i = 0; out.saved != nullptr && i < visible.count; ++i) {
      const Index from = s * scores + i * padded;
      std::copy_n(query_scores + from, padded, out.saved->query_weights.row(visible.token[i]).data());
      std::copy_n(key_scores + from, padded, out.saved->key_weights.row(visible.token[i]).data());
    }
    write_rows(call, out, stretch, scratch, [&](Index token) {
      const Index i = token - stretch.first;
      return i < first_seen ? nullptr : global_keys.row(i);
    });
  });
}

/// The prefix means of a stretch again, from where it started and the weights of its tokens.
template <class T>
struct PrefixMeans {
  Tokens<T> query;  ///< gq_t
  Tokens<T> p;      ///< gq_t * k_t, of visible tokens
  Tokens<T> key;    ///< gk_t

  PrefixMeans(const AdditiveCall<T>& call, const AdditiveSaved<T>& saved, Index s, const Visible& visible, bool keys,
              Scratch& scratch) {
    const PoolingShape shape = call.query_shape();
    const Index width = call.width();
    const Index padded = shape.padded();
    const Stretch& stretch = call.stretches[s];
    const SoftmaxPool<T> from = SoftmaxPool<T>::at(scratch.take<T>(SoftmaxPool<T>::size(shape)), shape);
    T* const weights = scratch.take<T>(prefix_stretch * padded);
    const auto prefix = [&](const Matrix<T>& token_weights, const Matrix<T>& start, Tokens<const T> rows) {
      const Tokens<T> means(scratch.take<T>(stretch.count * width), stretch.count, width, width);
      for (Index i = 0; i < visible.count; ++i) {
        std::copy_n(token_weights.row(visible.token[i]).data(), padded, weights + i * padded);
      }
      std::copy_n(start.row(s).data(), width, from.mean);
      prefix_means<T>(shape, weights, rows, visible.at, from, means);
      return means;
    };
    query = prefix(saved.query_weights, saved.query_means, call.inputs.query.middle_rows(stretch.first, stretch.count));
    if (!keys) return;
    p = Tokens<T>(scratch.take<T>(stretch.count * width), stretch.count, width, width);
    std::copy_n(query.data(), stretch.count * width, p.data());
    multiply_keys(call, visible, p);
    key = prefix(saved.key_weights, saved.key_means, p);
  }
};

/// Goes back through a stretch's keys, `after` being what the rows behind it leave. With `queries` it writes the
/// gradients of value and key, turns the rows of grad.inputs.query into the gradients of gq, and takes these into
/// `queries`; without (a null vector) it takes the stretch into `after`, no more.
template <class T>
void prefix_keys_backward(const AdditiveCall<T>& call, const AdditiveGradients<T>& grad, Index s,
                          const SuffixSums<T>& after, const SuffixSums<T>& queries, T* grad_weights, Scratch& scratch) {
  constexpr Index tile = pooling_tile;
  const bool write = queries.vector != nullptr;
  const PoolingShape shape = call.query_shape();
  const Index width = call.width();
  const Index padded = shape.padded();
  const Stretch& stretch = call.stretches[s];
  const Visible visible(call, stretch);
  const PrefixMeans<T> mean(call, grad.saved, s, visible, true, scratch);
  const T* const none = nullptr;
  T* const grad_global_key = scratch.take<T>(width);
  T* const unused = scratch.take<T>(call.heads.value_cols());
  const Tokens<T> grad_p(scratch.take<T>(tile * width), tile, width, width);
  T* const grad_scores = scratch.take<T>(tile * padded);
  std::fill_n(grad_scores, tile * padded, T(0));
  const T* const weights = interleave(shape, call.w_k, scratch);
  T* const interleaved = scratch.take<T>(padded * width);
  std::fill_n(interleaved, padded * width, T(0));

  for (Index end = stretch.count, first; end > 0; end = first) {
    first = (end - 1) / tile * tile;
    Index rows[tile];
    Index grad_rows[tile];
    Index listed = 0;
    for (Index i = end; i-- > first;) {
      const Index token = stretch.first + i;
      T* const grad_value = write ? grad.inputs.value.row(token) : unused;
      if (reads_value(call, grad, token)) {
        blend_row_backward<T>(call.heads, mean.key.row(i), call.inputs.value.row(token), grad.u.row(token), grad_value,
                              none, grad_global_key);
      } else {
        std::fill_n(grad_value, call.heads.value_cols(), T(0));
        std::fill_n(grad_global_key, width, T(0));
      }
      const bool wanted = write && visible.at[i];
      prefix_backward_row<T>(
          shape, mean.key.row(i), grad_global_key, visible.at[i] ? grad.saved.key_weights.row(token).data() : nullptr,
          wanted ? mean.p.row(i) : nullptr, after, grad_p.row(listed), grad_scores + listed * padded);
      if (!wanted) continue;
      rows[listed] = i;
      grad_rows[listed] = listed;
      ++listed;
    }
    if (!write) continue;
    score_rows_backward<T>(shape, weights, {mean.p, rows, listed}, grad_scores, {grad_p, grad_rows, listed},
                           interleaved);
    for (Index i = end, at = 0; i-- > first;) {
      const Index token = stretch.first + i;
      T* const grad_global_query = grad.inputs.query.row(token);
      if (visible.at[i]) {
        blend_row_backward<T>(call.heads, mean.query.row(i), call.inputs.key.row(token), grad_p.row(at++),
                              grad.inputs.key.row(token), none, grad_global_query);
      } else {
        std::fill_n(grad_global_query, width, T(0));
        std::fill_n(grad.inputs.key.row(token), call.heads.key_cols(), T(0));
      }
      prefix_backward_row<T>(shape, mean.query.row(i), grad_global_query,
                             visible.at[i] ? grad.saved.query_weights.row(token).data() : nullptr, nullptr, queries,
                             nullptr, nullptr);
    }
  }
  if (write) undo_interleave(shape, interleaved, grad_weights);
}

/// Turns the gradients of gq in the rows of grad.inputs.query into those of the queries.
template <class T>
void prefix_queries_backward(const AdditiveCall<T>& call, const AdditiveGradients<T>& grad, Index s,
                             const SuffixSums<T>& after, T* grad_weights, Scratch& scratch) {
  constexpr Index tile = pooling_tile;
  const PoolingShape shape = call.query_shape();
  const Index padded = shape.padded();
  const Stretch& stretch = call.stretches[s];
  const Visible visible(call, stretch);
  const PrefixMeans<T> mean(call, grad.saved, s, visible, false, scratch);
  T* const grad_scores = scratch.take<T>(tile * padded);
  std::fill_n(grad_scores, tile * padded, T(0));
  const T* const weights = interleave(shape, call.w_q, scratch);
  T* const interleaved = scratch.take<T>(padded * call.width());
  std::fill_n(interleaved, padded * call.width(), T(0));
  for (Index end = stretch.count, first; end > 0; end = first) {
    first = (end - 1) / tile * tile;
    Index tokens[tile];
    Index listed = 0;
    for (Index i = end; i-- > first;) {
      const Index token = stretch.first + i;
      T* const row = grad.inputs.query.row(token);
      prefix_backward_row<T>(
          shape, mean.query.row(i), row, visible.at[i] ? grad.saved.query_weights.row(token).data() : nullptr,
          visible.at[i] ? call.inputs.query.row(token) : nullptr, after, row, grad_scores + listed * padded);
      if (visible.at[i]) tokens[listed++] = token;
    }
    score_rows_backward<T>(shape, weights, {call.inputs.query, tokens, listed}, grad_scores,
                           {grad.inputs.query, tokens, listed}, interleaved);
    for (Index i = first; call.add_query && i < end; ++i) {
      T* const row = grad.inputs.query.row(stretch.first + i);
      const T* const more = grad.out.row(stretch.first + i);
      for (Index c = 0; c < call.width(); ++c) row[c] += more[c];
    }
  }
  undo_interleave(shape, interleaved, grad_weights);
}

/// The rounds of the forward pass from the end: what the rows of each stretch leave for the keys before it; the keys,
/// and what is left for the queries before; the queries.
template <class T>
void additive_prefix_backward(const AdditiveCall<T>& call, const AdditiveGradients<T>& grad) {
  const PoolingShape shape = call.query_shape();
  const Stretches& stretches = call.stretches;
  const Index width = call.width();
  const Index size = SuffixSums<T>::size(shape);
  const Index weights = shape.padded() * width;
  T* const queries = call.work.template take<T>(stretches.count() * size);
  T* const keys = call.work.template take<T>(stretches.count() * size);
  T* const weight_parts = call.work.template take<T>(stretches.count() * weights);
  const auto suffix = [&](T* sums, Index s) { return SuffixSums<T>::at(sums + s * size, shape); };
  // Turns what each stretch leaves into what all stretches behind it leave.
  const auto join = [&](T* sums) {
    call.work.for_each(stretches.sequences(), [&](Index b, Scratch& scratch) {
      const auto after = SuffixSums<T>::at(scratch.take<T>(size), shape);
      const auto own = SuffixSums<T>::at(scratch.take<T>(size), shape);
      after.start(shape);
      for (Index s = stretches.of(b).end; s-- > stretches.of(b).first;) {
        own.copy_from(suffix(sums, s), shape);
        suffix(sums, s).copy_from(after, shape);
        own.join(after, shape);
        after.copy_from(own, shape);
      }
    });
  };

  if (grad.w_t.data() != nullptr) {
    const Index n = call.inputs.query.rows();
    const Tokens<T> u(call.work.template take<T>(n * width), n, width, width);
    call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
      const Visible visible(call, stretches[s]);
      const PrefixMeans<T> mean(call, grad.saved, s, visible, true, scratch);
      const T* const none = nullptr;
      for (Index i = 0; i < stretches[s].count; ++i) {
        const Index token = stretches[s].first + i;
        blend_row<T>(call.heads, reads_value(call, grad, token) ? mean.key.row(i) : nullptr,
                     call.inputs.value.row(token), none, u.row(token), none, none);
      }
    });
    transform_weights_backward(call, grad, [&](Index token, const Stretch&, Index first, Index count, T* to) {
      std::copy_n(u.row(token) + first, count, to);
    });
  }
  call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
    suffix(keys, s).start(shape);
    // What the first stretch of a sequence leaves, nobody takes.
    if (s == stretches.of(stretches[s].sequence).first) return;
    prefix_keys_backward<T>(call, grad, s, suffix(keys, s), {}, nullptr, scratch);
  });
  join(keys);
  call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
    suffix(queries, s).start(shape);
    prefix_keys_backward(call, grad, s, suffix(keys, s), suffix(queries, s), weight_parts + s * weights, scratch);
  });
  sum_weight_gradients(call, weight_parts, grad.w_k);
  join(queries);
  call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
    prefix_queries_backward(call, grad, s, suffix(queries, s), weight_parts + s * weights, scratch);
  });
  sum_weight_gradients(call, weight_parts, grad.w_q);
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
