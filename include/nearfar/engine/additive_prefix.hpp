#pragma once

#include <nearfar/engine/additive_call.hpp>
#include <nearfar/engine/prefix_pooling.hpp>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// Causal additive attention. Each token has its own gq and gk, prefix means of the queries and of p = gq * k. A stretch
// of tokens pools its own queries first; in its turn it learns where its prefix means start, and hands on where those
// of the next do; with them it pools its own p, takes a second turn, and writes its rows of out. All that it reads more
// than once is in the cache by then, and each score is computed once.

/// Tokens of a causal stretch: what backward recomputes at a time.
inline constexpr Index prefix_stretch = 64;

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

/// One of the two prefix poolings of all sequences, handed on from stretch to stretch.
template <class T>
class PrefixPools {
 public:
  /// `state` is where a stream stands, or null.
  PrefixPools(const AdditiveCall<T>& call, T* state)
      : shape_(call.query_shape()),
        call_(call),
        turns_(call.work, call.stretches),
        pools_(state == nullptr ? call.work.template take<T>(call.stretches.sequences() * size()) : state) {
    for (Index b = 0; state == nullptr && b < call.stretches.sequences(); ++b) at(pools_ + b * size()).start(shape_);
  }

  /// Pools `count` rows of stretch s, as pool() does, and gives their weights, each in its own prefix. mean gets the
  /// mean where the stretch starts; the result says whether any row came before.
  template <class Show>
  bool pool_stretch(Index s, const T* weights, T* mean, T* scores, Index count, Show&& show, Scratch& scratch) const {
    const SoftmaxPool<T> own = at(scratch.take<T>(size()));
    const SoftmaxPool<T> start = at(scratch.take<T>(size()));
    own.start(shape_);
    pool<T>(shape_, weights, count, show, scores, own, scratch);
    turns_.take(s, [&] {
      const SoftmaxPool<T> handed_on = at(pools_ + call_.stretches[s].sequence * size());
      start.copy_from(handed_on, shape_);
      handed_on.merge(own, shape_);
    });
    start.means(shape_, mean);
    const bool seen = start.sum[0] != T(0);
    prefix_weights(shape_, scores, count, start, scratch);
    return seen;
  }

 private:
  Index size() const { return SoftmaxPool<T>::size(shape_); }
  SoftmaxPool<T> at(T* memory) const { return SoftmaxPool<T>::at(memory, shape_); }

  PoolingShape shape_;
  const AdditiveCall<T>& call_;
  Turns turns_;
  T* pools_;
};

template <class T>
void additive_prefix(const AdditiveCall<T>& call, const AdditiveOut<T>& out, T* state) {
  const PoolingShape shape = call.query_shape();
  const PoolingShape key_shape = call.key_shape();
  const Stretches& stretches = call.stretches;
  const Index width = call.width();
  const Index padded = shape.padded();
  const T* const w_q = interleave(shape, call.w_q, call.work);
  const T* const w_k = interleave(shape, call.w_k, call.work);
  const PrefixPools<T> queries(call, state);
  const PrefixPools<T> keys(call, state == nullptr ? nullptr : state + SoftmaxPool<T>::size(shape));
  const auto save = [&](const Visible& visible, const T* weights, const T* mean, Index s, Matrix<T>& saved_weights,
                        Matrix<T>& saved_means) {
    std::copy_n(mean, width, saved_means.row(s).data());
    for (Index i = 0; i < visible.count; ++i) {
      std::copy_n(weights + i * padded, padded, saved_weights.row(visible.token[i]).data());
    }
  };

  call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
    const Visible visible(call, stretches[s]);
    const auto take_row = [&] { return scratch.take<T>(width); };
    T* const query_start = take_row();
    T* const query_weights = scratch.take<T>(shape.scores<T>(visible.count));
    queries.pool_stretch(
        s, w_q, query_start, query_weights, visible.count,
        [&](Index first, RowBlock<T>& block) {
          for (Index r = 0; r < std::min<Index>(row_block, visible.count - first); ++r) {
            const Index token = visible.token[first + r];
            block.rows[r] = call.inputs.query.row(token);
            block.later[r] = call.inputs.key.row(token);
          }
        },
        scratch);

    // gq_t comes twice, here and for the rows of out: to keep the products would cost more.
    T* const products = scratch.take<T>(2 * row_block * width);
    T* const global_query = take_row();
    std::copy_n(query_start, width, global_query);
    T* const global_key = take_row();
    T* const key_weights = scratch.take<T>(shape.scores<T>(visible.count));
    bool seen = keys.pool_stretch(
        s, w_k, global_key, key_weights, visible.count,
        [&](Index first, RowBlock<T>& block) {
          for (Index r = 0; r < std::min<Index>(row_block, visible.count - first); ++r) {
            const Index token = visible.token[first + r];
            T* const p = products + (first + r) % (2 * row_block) * width;
            const T* const key = call.inputs.key.row(token);
            advance_means(shape, query_weights + (first + r) * padded, call.inputs.query.row(token), global_query,
                          [&](Index h) {
                            return [k = key + key_shape.column(h), to = p + h * shape.dim]<class P>(
                                       Index c, const P& mean) { pstoreu(to + c, pmul(mean, ploadu<P>(k + c))); };
                          });
            block.rows[r] = p;
            block.later[r] = call.inputs.value.row(token);
          }
        },
        scratch);

    if (out.saved != nullptr) {
      save(visible, query_weights, query_start, s, out.saved->query_weights, out.saved->query_means);
      save(visible, key_weights, global_key, s, out.saved->key_weights, out.saved->key_means);
    }
    const T* query_weight = query_weights;
    const T* key_weight = key_weights;
    std::copy_n(query_start, width, global_query);
    // Rows are written while memory is asked for the queries of this thread's next stretch.
    const Ahead ahead{0, call.work.threads() * prefix_stretch};
    write_rows(call, out, stretches[s].first, stretches[s].count, ahead, scratch, [&](Index token) {
      if (visible.at[token - stretches[s].first]) {
        const T* const key = call.inputs.key.row(token);
        advance_means(shape, query_weight, call.inputs.query.row(token), global_query, [&](Index h) {
          return [k = key + key_shape.column(h), weight = key_weight[h], to = global_key + h * shape.dim]<class P>(
                     Index c, const P& mean) { advance(P(pmul(mean, ploadu<P>(k + c))), weight, to + c); };
        });
        query_weight += padded;
        key_weight += padded;
        seen = true;
      }
      return seen ? global_key : nullptr;
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
    const Stretch& stretch = call.stretches[s];
    const auto take_rows = [&] {
      return Tokens<T>(scratch.take<T>(stretch.count * width), stretch.count, width, width);
    };
    const auto prefix = [&](const Matrix<T>& weights, const Matrix<T>& start, Tokens<const T> rows) {
      const Tokens<T> means = take_rows();
      const T* before = start.row(s).data();
      for (Index i = 0; i < stretch.count; ++i) {
        std::copy_n(before, width, means.row(i));
        if (visible.at[i]) {
          advance_means<T>(shape, weights.row(stretch.first + i).data(), rows.row(i), means.row(i),
                           [](Index) { return [](Index, const auto&) {}; });
        }
        before = means.row(i);
      }
      return means;
    };
    query = prefix(saved.query_weights, saved.query_means, call.inputs.query.middle_rows(stretch.first, stretch.count));
    if (!keys) return;
    p = take_rows();
    for (Index i = 0; i < visible.count; ++i) {
      const T* const none = nullptr;
      const Index row = visible.row[i];
      blend_row<T>(call.heads, query.row(row), call.inputs.key.row(visible.token[i]), none, p.row(row));
    }
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
                     call.inputs.value.row(token), none, u.row(token));
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
