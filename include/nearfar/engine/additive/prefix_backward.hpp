#pragma once

#include <nearfar/engine/additive/prefix.hpp>
#include <nearfar/engine/additive/softmax_pooling_backward.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The prefix means of a stretch again, from where it started and the weights of its visible tokens:
///
///   gq_t = gq_(t-1) + alpha_t (q_t - gq_(t-1))     p_t = gq_t * k_t     gk_t = gk_(t-1) + beta_t (p_t - gk_(t-1))
///
/// Row r of gq and gk is what they are after r of these tokens. Meanwhile fetches, `fetches` times.
template <class T>
struct PrefixMeans {
  Tokens<T> query;  ///< gq
  Tokens<T> p;      ///< of the visible tokens
  Tokens<T> key;    ///< gk

  static Index fetches(const AdditiveCall<T>& call, const Visible& visible) { return call.heads.query * visible.count; }

  PrefixMeans(const AdditiveCall<T>& call, const AdditiveSaved<T>& saved, Index s, const Visible& visible, Spread fetch,
              Scratch& scratch) {
    const Index width = call.width();
    const auto take = [&](Index rows) { return take_rows<T>(scratch, rows, width); };
    const auto start = [&](const Matrix<T>& means) {
      const Tokens<T> rows = take(visible.count + 1);
      std::copy_n(means.row(s).data(), width, rows.row(0));
      return rows;
    };
    query = start(saved.query_means);
    p = take(visible.count);
    key = start(saved.key_means);
    const PoolingShape shape = call.key_shape();
    for (Index h = 0; h < shape.heads; ++h) {
      for_each_column_block<4, T>(shape.dim, [&](auto by, auto block, Index first) {
        using P = typename decltype(by)::template Of<T>;
        constexpr int packets = decltype(block)::value;
        constexpr Index step = Index{sizeof(P) / sizeof(T)};
        const Index own = h * shape.dim + first;
        const Index shared = shape.column(h) + first;
        // A few columns of both means stay in registers from token to token.
        P gq[packets], gk[packets];
        NEARFAR_UNROLL for (int i = 0; i < packets; ++i) {
          gq[i] = ploadu<P>(query.row(0) + own + i * step);
          gk[i] = ploadu<P>(key.row(0) + own + i * step);
        }
        for (Index r = 0; r < visible.count; ++r) {
          fetch();
          const Index token = visible.token[r];
          const P alpha = pset1<P>(saved.query_weights(token, h));
          const P beta = pset1<P>(saved.key_weights(token, h));
          // Taken here: what stands in memory would be read again after each store, which might have changed it.
          const T* const q = call.inputs.query.row(token) + own;
          const T* const k = call.inputs.key.row(token) + shared;
          T* const to_query = query.row(r + 1) + own;
          T* const to_p = p.row(r) + own;
          T* const to_key = key.row(r + 1) + own;
          NEARFAR_UNROLL for (int i = 0; i < packets; ++i) {
            gq[i] = advance(gq[i], alpha, ploadu<P>(q + i * step));
            const P product = pmul(gq[i], ploadu<P>(k + i * step));
            gk[i] = advance(gk[i], beta, product);
            pstoreu(to_query + i * step, gq[i]);
            pstoreu(to_p + i * step, product);
            pstoreu(to_key + i * step, gk[i]);
          }
        }
      });
    }
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

/// The backward pass of one stretch: of the keys' pooling first, which pools the rows p, then of the queries'.
template <class T>
class PrefixBackward {
 public:
  /// `next` is the stretch that this thread likely goes through after stretch s.
  PrefixBackward(const AdditiveCall<T>& call, const AdditiveGradients<T>& grad, Index s, const Stretch& next,
                 Scratch& scratch)
      : call_(call),
        grad_(grad),
        shape_(call.key_shape()),
        stretch_(call.stretches[s]),
        visible_(call, stretch_),
        room_(scratch.take<T>(stretch_.count * call.width())),
        grad_values_(whole_rows(grad.inputs.value)),
        grad_keys_(whole_rows(grad.inputs.key)),
        mean_(call, grad.saved, s, visible_, fetch_own(), scratch),
        grad_rows_(scratch.take<T>(visible_.count * call.width()), visible_.count, call.width(), call.width()),
        grad_scores_(scratch.take<T>(prefix_stretch * shape_.padded())) {
    list_rows_of_keys(scratch);
    list_rows_of_queries();
    Lookahead ahead;
    grad_keys_.announce(ahead);
    if (!queries_past_caches()) ahead.add(grad_queries());
    ahead.add(call.inputs.query.middle_rows(next.first, next.count));
    ahead.add(call.inputs.key.middle_rows(next.first, next.count));
    fetch_ = Spread(ahead, 2 * (of_keys_.fetches(shape_) + of_queries_.fetches(shape_) +
                                score_fetches<T>(call.query_shape(), visible_.count)));
  }

  /// What the rows of out leave for the keys before the stretch.
  void leave_for_keys(const SuffixSums<T>& own) { of_keys_.leave(shape_, own, fetch_); }

  /// Writes the gradients of values and finds those of p. `after` is what all rows behind leave for the keys.
  void keys(const SuffixSums<T>& after, T* grad_weights) {
    of_keys_.go_back(shape_, after, fetch_);
    grad_values_.finish();
    scores_backward(0, call_.w_k, mean_.p, grad_weights, {}, grad_rows_, {});
  }

  /// What the rows of p leave for the queries before the stretch.
  void leave_for_queries(const SuffixSums<T>& own) { of_queries_.leave(shape_, own, fetch_); }

  /// Writes the gradients of keys and queries. `after` is what all rows behind leave for the queries.
  void queries(const SuffixSums<T>& after, T* grad_weights) {
    of_queries_.go_back(shape_, after, fetch_);
    for (Index i = 0; i < stretch_.count; ++i) {
      if (!visible_.at[i]) std::fill_n(grad_keys_.rows.row(i), call_.heads.key_cols(), T(0));
    }
    grad_keys_.finish();

    const Tokens<const T> query = call_.inputs.query.middle_rows(stretch_.first, stretch_.count);
    const Tokens<const T> start =
        call_.add_query ? grad_.out.middle_rows(stretch_.first, stretch_.count) : Tokens<const T>{};
    const Tokens<T> to = grad_queries();
    with_store(queries_past_caches(), [&](auto store) {
      for_each_run(
          0, stretch_.count, [&](Index i) { return visible_.at[i]; },
          [&](Index i, Index count) {
            scores_backward(visible_.seen[i] - 1, call_.w_q, query.middle_rows(i, count), grad_weights,
                            start.middle_rows(i, count), to.middle_rows(i, count), store);
          },
          [&](Index i) {
            T* const row = to.row(i);
            call_.add_query ? std::copy_n(start.row(i), call_.width(), row) : std::fill_n(row, call_.width(), T(0));
          });
    });
  }

 private:
  /// The stretch's rows of a gradient. One is finished before the next is written, so that both may share the room.
  WholeRows<T> whole_rows(const Tokens<T>& gradient) const {
    return {gradient, stretch_.first, stretch_.count, shape_.dim, room_};
  }

  /// Its gradients of queries, which are written whole rows at a time as they come.
  Tokens<T> grad_queries() const { return grad_.inputs.query.middle_rows(stretch_.first, stretch_.count); }
  bool queries_past_caches() const { return rows_past_caches(grad_.inputs.query, shape_.dim); }

  /// What the stretch's means, which come first, do not read themselves, fetched meanwhile.
  Spread fetch_own() const {
    Lookahead ahead;
    ahead.add(call_.inputs.value.middle_rows(stretch_.first, stretch_.count));
    ahead.add(grad_.u.middle_rows(stretch_.first, stretch_.count));
    grad_values_.announce(ahead);
    return Spread(ahead, PrefixMeans<T>::fetches(call_, visible_));
  }

  /// All tokens have a row of out; those that are not visible enter no mean.
  void list_rows_of_keys(Scratch& scratch) {
    T* const zeros = scratch.take<T>(call_.width());
    T* const unused = scratch.take<T>(call_.width());
    std::fill_n(zeros, call_.width(), T(0));
    of_keys_.count = stretch_.count;
    for (Index i = 0; i < stretch_.count; ++i) {
      const Index token = stretch_.first + i;
      const Index row = visible_.seen[i] - 1;
      const bool visible = visible_.at[i], read = reads_value(call_, grad_, token);
      if (!read) std::fill_n(grad_values_.rows.row(i), call_.heads.value_cols(), T(0));
      of_keys_.weight[i] = grad_.saved.key_weights.row(token).data();
      of_keys_.mean[i] = mean_.key.row(row + 1);
      of_keys_.factor[i] = read ? call_.inputs.value.row(token) : zeros;
      of_keys_.grad[i] = read ? grad_.u.row(token) : zeros;
      of_keys_.grad_factor[i] = read ? grad_values_.rows.row(i) : unused;
      of_keys_.x[i] = visible ? mean_.p.row(row) : zeros;
      of_keys_.grad_x[i] = visible ? grad_rows_.row(row) : unused;
      of_keys_.grad_score[i] = visible ? grad_scores_ + row * shape_.padded() : unused;
    }
  }

  /// Their gradients take the place of those of p.
  void list_rows_of_queries() {
    of_queries_.count = visible_.count;
    for (Index r = 0; r < visible_.count; ++r) {
      const Index token = visible_.token[r];
      of_queries_.weight[r] = grad_.saved.query_weights.row(token).data();
      of_queries_.mean[r] = mean_.query.row(r + 1);
      of_queries_.factor[r] = call_.inputs.key.row(token);
      of_queries_.grad[r] = grad_rows_.row(r);
      of_queries_.grad_factor[r] = grad_keys_.rows.row(token - stretch_.first);
      of_queries_.x[r] = call_.inputs.query.row(token);
      of_queries_.grad_x[r] = grad_rows_.row(r);
      of_queries_.grad_score[r] = grad_scores_ + r * shape_.padded();
    }
  }

  /// grad_x = the rows of grad_rows_ from `first` on + what reaches the rows of x through their scores + start, which
  /// may be empty (zero).
  void scores_backward(Index first, const T* weights, Tokens<const T> x, T* grad_weights, Tokens<const T> start,
                       Tokens<T> grad_x, KeepOrPastCaches store) {
    score_rows_backward<T>(call_.query_shape(), weights, grad_scores_ + first * shape_.padded(), x, grad_weights, {},
                           {grad_rows_.middle_rows(first, x.rows()), start}, grad_x, store, fetch_);
  }

  const AdditiveCall<T>& call_;
  const AdditiveGradients<T>& grad_;
  PoolingShape shape_;
  Stretch stretch_;
  Visible visible_;
  T* room_;
  WholeRows<T> grad_values_;
  WholeRows<T> grad_keys_;
  PrefixMeans<T> mean_;
  PrefixRows<T> of_keys_;
  PrefixRows<T> of_queries_;
  Tokens<T> grad_rows_;  ///< of p, then of the queries, but for what reaches these through their scores
  T* grad_scores_;
  Spread fetch_;  ///< what the gradients are written to, and what the means of the next stretch read
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
    const Tokens<T> u = take_rows<T>(call.work, n, width);
    call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
      const Visible visible(call, stretches[s]);
      const PrefixMeans<T> mean(call, grad.saved, s, visible, Spread(), scratch);
      const T* const none = nullptr;
      for (Index i = 0; i < stretches[s].count; ++i) {
        const Index token = stretches[s].first + i;
        blend_row<T>(call.heads, reads_value(call, grad, token) ? mean.key.row(visible.seen[i]) : nullptr,
                     call.inputs.value.row(token), none, u.row(token));
      }
    });
    transform_weights_backward(call, grad, [&](Index token, const Stretch&, Index first, Index count, T* to) {
      std::copy_n(u.row(token) + first, count, to);
    });
  }

  const HandedOn<T> to_keys(call);
  const HandedOn<T> to_queries(call);
  const Turns sums(call.work, stretches, Turns::last_of_batch_first);
  grad.w_q.matrix().setZero();
  grad.w_k.matrix().setZero();
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
    const Index next = call.work.likely_next(index);
    PrefixBackward<T> stretch(call, grad, s,
                              next < stretches.count() ? stretches[stretches.count() - 1 - next] : Stretch{}, scratch);
    // What the first stretch of a sequence leaves, nobody takes.
    const bool leaves = s != stretches.of(stretches[s].sequence).first;
    if (leaves) stretch.leave_for_keys(own_keys);
    to_keys.take(s, own_keys, after);
    stretch.keys(after, grad_w_k);
    if (leaves) stretch.leave_for_queries(own_queries);
    to_queries.take(s, own_queries, after);
    stretch.queries(after, grad_w_q);
    sums.take(s, [&] {
      const auto add = [&](const T* own, Tokens<T> sum) {
        for (Index h = 0; h < sum.rows(); ++h) {
          for (Index c = 0; c < width; ++c) sum(h, c) += own[h * width + c];
        }
      };
      add(grad_w_q, grad.w_q);
      add(grad_w_k, grad.w_k);
    });
  });
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
