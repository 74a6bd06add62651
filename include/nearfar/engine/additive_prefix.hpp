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

  /// What the task of stretch s holds.
  Turns::Promise promise(Index s) const { return {turns_, s}; }

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
    const auto query_promise = queries.promise(s);
    const auto key_promise = keys.promise(s);
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

  PrefixMeans(const AdditiveCall<T>& call, const AdditiveSaved<T>& saved, Index s, const Visible& visible,
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
    p = take_rows();
    for (Index i = 0; i < visible.count; ++i) {
      const T* const none = nullptr;
      const Index row = visible.row[i];
      blend_row<T>(call.heads, query.row(row), call.inputs.key.row(visible.token[i]), none, p.row(row));
    }
    key = prefix(saved.key_weights, saved.key_means, p);
  }
};

/// What the stretches behind leave for those before, handed on from the last of a sequence to the first.
template <class T>
class HandedOn {
 public:
  explicit HandedOn(const AdditiveCall<T>& call)
      : shape_(call.query_shape()),
        stretches_(call.stretches),
        turns_(call.work, call.stretches, Turns::last_first),
        sums_(call.work.template take<T>(call.stretches.sequences() * SuffixSums<T>::size(shape_))) {
    for (Index b = 0; b < stretches_.sequences(); ++b) at(b).start(shape_);
  }

  /// What the task of stretch s holds.
  Turns::Promise promise(Index s) const { return {turns_, s}; }

  /// Takes what is left for stretch s into `after`, and hands it on with what s leaves itself, which is used up.
  void take(Index s, const SuffixSums<T>& own, const SuffixSums<T>& after) const {
    turns_.take(s, [&] {
      const SuffixSums<T> handed = at(stretches_[s].sequence);
      after.copy_from(handed, shape_);
      own.join(after, shape_);
      handed.copy_from(own, shape_);
    });
  }

 private:
  SuffixSums<T> at(Index b) const { return SuffixSums<T>::at(sums_ + b * SuffixSums<T>::size(shape_), shape_); }

  PoolingShape shape_;
  const Stretches& stretches_;
  Turns turns_;
  T* sums_;
};

/// The backward pass of one stretch.
template <class T>
class PrefixBackward {
 public:
  PrefixBackward(const AdditiveCall<T>& call, const AdditiveGradients<T>& grad, Index s, Scratch& scratch)
      : call_(call),
        grad_(grad),
        shape_(call.query_shape()),
        stretch_(call.stretches[s]),
        visible_(call, stretch_),
        mean_(call, grad.saved, s, visible_, scratch),
        grad_global_key_(scratch.take<T>(call.width())),
        grad_scores_(scratch.take<T>(backward_rows * shape_.padded())),
        grad_p_(scratch.take<T>(backward_rows * call.width()), backward_rows, call.width(), call.width()) {}

  /// What the rows of out leave for the keys before the stretch.
  void leave_for_keys(const SuffixSums<T>& own, Scratch& scratch) const {
    const Scratch::Scope scope(scratch);
    T* const unused = scratch.take<T>(call_.heads.value_cols());
    for (Index i = stretch_.count; i-- > 0;) {
      find_grad_global_key(i, unused);
      pass_row(mean_.key, i, grad_global_key_, grad_.saved.key_weights, own);
    }
  }

  /// Writes the gradients of value and key, leaves those of gq in the rows of grad.inputs.query and takes them into
  /// `own`. `after` is what all rows behind leave for the keys.
  void keys(const SuffixSums<T>& after, const SuffixSums<T>& own, T* grad_weights) const {
    for_each_tile([&](Index first, Index end) {
      for (Index i = end; i-- > first;) {
        find_grad_global_key(i, grad_.inputs.value.row(stretch_.first + i));
        take_row(mean_.key, i, grad_global_key_, grad_.saved.key_weights, mean_.p.row(i), after, grad_p_.row(i - first),
                 i - first);
      }
      scores_backward(first, end, call_.w_k, mean_.p, grad_p_.middle_rows(0, end - first), grad_weights);
      for (Index i = end; i-- > first;) {
        const Index token = stretch_.first + i;
        T* const grad_global_query = grad_.inputs.query.row(token);
        if (visible_.at[i]) {
          blend_row_backward<T>(call_.heads, mean_.query.row(i), call_.inputs.key.row(token), grad_p_.row(i - first),
                                grad_.inputs.key.row(token), false, grad_global_query);
        } else {
          std::fill_n(grad_global_query, call_.width(), T(0));
          std::fill_n(grad_.inputs.key.row(token), call_.heads.key_cols(), T(0));
        }
        pass_row(mean_.query, i, grad_global_query, grad_.saved.query_weights, own);
      }
    });
  }

  /// Turns the gradients of gq in the rows of grad.inputs.query into those of the queries.
  void queries(const SuffixSums<T>& after, T* grad_weights) const {
    const auto own = [&](auto rows) { return rows.middle_rows(stretch_.first, stretch_.count); };
    const Tokens<T> grad_rows = own(grad_.inputs.query);
    const Tokens<const T> query = own(call_.inputs.query);
    for_each_tile([&](Index first, Index end) {
      for (Index i = end; i-- > first;) {
        take_row(mean_.query, i, grad_rows.row(i), grad_.saved.query_weights, query.row(i), after, grad_rows.row(i),
                 i - first);
      }
      scores_backward(first, end, call_.w_q, query, grad_rows.middle_rows(first, end - first), grad_weights);
      for (Index i = first; call_.add_query && i < end; ++i) {
        const T* const more = grad_.out.row(stretch_.first + i);
        for (Index c = 0; c < call_.width(); ++c) grad_rows(i, c) += more[c];
      }
    });
  }

 private:
  template <class Tile>
  void for_each_tile(Tile&& tile) const {
    for (Index end = stretch_.count, first; end > 0; end = first) {
      first = (end - 1) / backward_rows * backward_rows;
      tile(first, end);
    }
  }

  void find_grad_global_key(Index i, T* grad_value) const {
    const Index token = stretch_.first + i;
    if (reads_value(call_, grad_, token)) {
      blend_row_backward<T>(call_.heads, mean_.key.row(i), call_.inputs.value.row(token), grad_.u.row(token),
                            grad_value, false, grad_global_key_);
    } else {
      std::fill_n(grad_value, call_.heads.value_cols(), T(0));
      std::fill_n(grad_global_key_, call_.width(), T(0));
    }
  }

  /// Takes row i into the sums, and if it is visible writes what reaches x and its scores.
  void take_row(Tokens<const T> mean, Index i, const T* grad_mean, const Matrix<T>& weights, const T* x,
                const SuffixSums<T>& sums, T* grad_x, Index tile_row) const {
    const bool visible = visible_.at[i];
    prefix_backward_row<T>(shape_, mean.row(i), grad_mean, visible ? weights.row(stretch_.first + i).data() : nullptr,
                           visible ? x : nullptr, sums, grad_x, grad_scores_ + tile_row * shape_.padded());
  }

  void pass_row(Tokens<const T> mean, Index i, const T* grad_mean, const Matrix<T>& weights,
                const SuffixSums<T>& sums) const {
    take_row(mean, i, grad_mean, weights, nullptr, sums, nullptr, 0);
  }

  /// What reaches the visible rows of x among [first, end) through their scores, added to grad_x, whose rows are those.
  void scores_backward(Index first, Index end, const T* weights, Tokens<const T> x, Tokens<T> grad_x,
                       T* grad_weights) const {
    for_each_run(
        first, end, [&](Index i) { return visible_.at[i]; },
        [&](Index run, Index count) {
          const auto at = [&](Index i, Index c) { return grad_x.row(run - first + i) + c; };
          score_rows_backward(
              shape_, weights, grad_scores_ + (run - first) * shape_.padded(), count, x.row(run), x.stride(),
              grad_weights,
              [&](auto by, Index i, Index h, Index c) {
                return ploadu<typename decltype(by)::template Of<T>>(at(i, h * shape_.dim + c));
              },
              [&](Index i, Index c, const auto& sum) { pstoreu(at(i, c), sum); });
        },
        [](Index) {});
  }

  const AdditiveCall<T>& call_;
  const AdditiveGradients<T>& grad_;
  PoolingShape shape_;
  const Stretch& stretch_;
  Visible visible_;
  PrefixMeans<T> mean_;
  T* grad_global_key_;
  T* grad_scores_;
  Tokens<T> grad_p_;
};

/// The forward pass from its end: a stretch finds what its rows leave for the keys before it, learns in its turn what
/// all rows behind it leave and hands on the sum, goes through its keys, does the same for the queries, and goes
/// through these.
template <class T>
void additive_prefix_backward(const AdditiveCall<T>& call, const AdditiveGradients<T>& grad) {
  const PoolingShape shape = call.query_shape();
  const Stretches& stretches = call.stretches;
  const Index width = call.width();
  const Index weights = shape.padded() * width;

  if (grad.w_t.data() != nullptr) {
    const Index n = call.inputs.query.rows();
    const Tokens<T> u(call.work.template take<T>(n * width), n, width, width);
    call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
      const Visible visible(call, stretches[s]);
      const PrefixMeans<T> mean(call, grad.saved, s, visible, scratch);
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

  const HandedOn<T> to_keys(call);
  const HandedOn<T> to_queries(call);
  const Turns sums(call.work, stretches, Turns::last_first);
  T* const sum_w_q = call.work.template take<T>(stretches.sequences() * weights);
  T* const sum_w_k = call.work.template take<T>(stretches.sequences() * weights);
  std::fill_n(sum_w_q, stretches.sequences() * weights, T(0));
  std::fill_n(sum_w_k, stretches.sequences() * weights, T(0));
  call.work.for_each(stretches.count(), [&](Index index, Scratch& scratch) {
    const Index s = stretches.count() - 1 - index;
    const auto key_promise = to_keys.promise(s);
    const auto query_promise = to_queries.promise(s);
    const Turns::Promise sum_promise(sums, s);
    const auto take_sums = [&] {
      const auto none = SuffixSums<T>::at(scratch.take<T>(SuffixSums<T>::size(shape)), shape);
      none.start(shape);
      return none;
    };
    const auto take_weights = [&] {
      T* const grad_weights = scratch.take<T>(weights);
      std::fill_n(grad_weights, weights, T(0));
      return grad_weights;
    };
    T* const grad_w_q = take_weights();
    T* const grad_w_k = take_weights();
    const SuffixSums<T> own_keys = take_sums();
    const SuffixSums<T> own_queries = take_sums();
    const SuffixSums<T> after = take_sums();
    const PrefixBackward<T> stretch(call, grad, s, scratch);
    // What the first stretch of a sequence leaves, nobody takes.
    if (s != stretches.of(stretches[s].sequence).first) stretch.leave_for_keys(own_keys, scratch);
    to_keys.take(s, own_keys, after);
    stretch.keys(after, own_queries, grad_w_k);
    to_queries.take(s, own_queries, after);
    stretch.queries(after, grad_w_q);
    sums.take(s, [&] {
      const Index at = stretches[s].sequence * weights;
      for (Index i = 0; i < weights; ++i) sum_w_q[at + i] += grad_w_q[i];
      for (Index i = 0; i < weights; ++i) sum_w_k[at + i] += grad_w_k[i];
    });
  });
  sum_weight_gradients(call, sum_w_q, stretches.sequences(), grad.w_q);
  sum_weight_gradients(call, sum_w_k, stretches.sequences(), grad.w_k);
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
