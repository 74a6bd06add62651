#pragma once

#include <nearfar/engine/additive/call.hpp>
#include <nearfar/engine/additive/prefix_pooling.hpp>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// Causal additive attention. Each token has its own gq and gk, prefix means of the queries and of p = gq * k. A stretch
// of tokens pools its own queries first; in its turn it learns where its prefix means start, and hands on where those
// of the next do; with them it pools its own p, takes a second turn, and writes its rows of out. All that it reads more
// than once is in the cache by then, and each score is computed once.

/// The visible tokens of a stretch.
struct Visible {
  bool at[prefix_stretch];      // whether token i of the stretch is
  Index seen[prefix_stretch];   // how many there are up to token i
  Index token[prefix_stretch];  // their numbers in the batch
  Index count = 0;

  template <class T>
  Visible(const AdditiveCall<T>& call, const Stretch& stretch) {
    for (Index i = 0; i < stretch.count; ++i) {
      at[i] = call.sees(stretch.first + i);
      if (at[i]) token[count++] = stretch.first + i;
      seen[i] = count;
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

  /// What the task of stretch s holds.
  Turns::Promise promise(Index s) const { return {turns_, s}; }

  /// Pools `count` rows of stretch s, as pool() does, and gives their weights, each in its own prefix. mean gets the
  /// mean where the stretch starts; the result says whether any row came before.
  bool pool_stretch(Index s, const T* weights, T* mean, T* scores, Index count, FunctionRef<const T*(Index)> row,
                    Spread& fetch, Scratch& scratch) const {
    const SoftmaxPool<T> own = at(scratch.take<T>(size()));
    const SoftmaxPool<T> start = at(scratch.take<T>(size()));
    own.start(shape_);
    pool<T>(shape_, weights, count, row, scores, own, fetch, scratch);
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
  const auto take = [&](Index count) { return call.work.template take<T>(count); };
  const T* const w_q = interleave<T>(shape, call.w_q, take);
  const T* const w_k = interleave<T>(shape, call.w_k, take);
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
    const auto query_promise = queries.promise(s);
    const auto key_promise = keys.promise(s);
    const Stretch stretch = stretches[s];
    const Visible visible(call, stretch);
    const auto take_row = [&] { return scratch.take<T>(width); };
    // What a walk over the stretch reads is fetched during the one before: of the next queries two fifths during the
    // second, since the third also writes.
    const Stretch next = call.after(s);
    const Index early = next.count * 2 / 5;
    const Index poolings = shape.fetches<T>(visible.count);
    const Index rows_of_heads = visible.count * shape.heads;
    Lookahead keys_ahead, values_ahead, queries_ahead;
    keys_ahead.add(call.inputs.key.middle_rows(stretch.first, stretch.count));
    values_ahead.add(call.inputs.value.middle_rows(stretch.first, stretch.count));
    values_ahead.add(call.inputs.query.middle_rows(next.first, early));
    queries_ahead.add(call.inputs.query.middle_rows(next.first + early, next.count - early));
    Spread fetch_keys(keys_ahead, poolings);
    Spread fetch_values(values_ahead, poolings + rows_of_heads);
    Spread fetch_queries(queries_ahead, rows_of_heads);

    T* const query_start = take_row();
    T* const query_weights = scratch.take<T>(shape.scores<T>(visible.count));
    queries.pool_stretch(
        s, w_q, query_start, query_weights, visible.count,
        [&](Index r) { return call.inputs.query.row(visible.token[r]); }, fetch_keys, scratch);

    // gq_t comes twice, here and for the rows of out: to keep the products would cost more.
    T* const products = scratch.take<T>(pool_rows * width);
    T* const global_query = take_row();
    std::copy_n(query_start, width, global_query);
    T* const global_key = take_row();
    T* const key_weights = scratch.take<T>(shape.scores<T>(visible.count));
    bool seen = keys.pool_stretch(
        s, w_k, global_key, key_weights, visible.count,
        [&](Index r) {
          T* const p = products + r % pool_rows * width;
          const T* const key = call.inputs.key.row(visible.token[r]);
          advance_means(shape, query_weights + r * padded, call.inputs.query.row(visible.token[r]), global_query,
                        [&](Index h) {
                          fetch_values();
                          return [k = key + key_shape.column(h), to = p + h * shape.dim]<class P>(
                                     Index c, const P& mean) { pstoreu(to + c, pmul(mean, ploadu<P>(k + c))); };
                        });
          return p;
        },
        fetch_values, scratch);

    if (out.saved != nullptr) {
      save(visible, query_weights, query_start, s, out.saved->query_weights, out.saved->query_means);
      save(visible, key_weights, global_key, s, out.saved->key_weights, out.saved->key_means);
    }
    const T* query_weight = query_weights;
    const T* key_weight = key_weights;
    std::copy_n(query_start, width, global_query);
    write_rows<T>(call, out, stretch.first, stretch.count, scratch, [&](Index token) {
      if (visible.at[token - stretch.first]) {
        const T* const key = call.inputs.key.row(token);
        advance_means(shape, query_weight, call.inputs.query.row(token), global_query, [&](Index h) {
          fetch_queries();
          return [k = key + key_shape.column(h), weight = key_weight[h], to = global_key + h * shape.dim]<class P>(
                     Index c, const P& mean) { advance_in_memory(P(pmul(mean, ploadu<P>(k + c))), weight, to + c); };
        });
        query_weight += padded;
        key_weight += padded;
        seen = true;
      }
      return seen ? global_key : nullptr;
    });
  });
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
