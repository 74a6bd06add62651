#pragma once

#include <nearfar/engine/additive_prefix.hpp>
#include <nearfar/engine/softmax_pooling_backward.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The prefix means of a stretch again, from where it started and the weights of its visible tokens. Row r of gq and gk
/// is what they are after r of these.
template <class T>
struct PrefixMeans {
  Tokens<T> query;  ///< gq
  Tokens<T> p;      ///< gq_t * k_t of the visible tokens
  Tokens<T> key;    ///< gk

  PrefixMeans(const AdditiveCall<T>& call, const AdditiveSaved<T>& saved, Index s, const Visible& visible,
              Scratch& scratch) {
    // Asked for as they lie, rows come at the speed of memory; the walks a head at a time would wait for each.
    for (const Tokens<const T>& rows : {call.inputs.query, call.inputs.key, call.inputs.value}) {
      for (Index i = call.stretches[s].first; i < call.stretches[s].end(); ++i) {
        prefetch_row(rows.row(i), rows.cols());
      }
    }
    const Index width = call.width();
    const auto take = [&](Index rows) { return Tokens<T>(scratch.take<T>(rows * width), rows, width, width); };
    const auto start = [&](const Matrix<T>& means) {
      const Tokens<T> rows = take(visible.count + 1);
      std::copy_n(means.row(s).data(), width, rows.row(0));
      return rows;
    };
    query = start(saved.query_means);
    p = take(visible.count);
    key = start(saved.key_means);
    const auto weight_in = [&](const Matrix<T>& weights) {
      return [&](Index r) { return weights.row(visible.token[r]).data(); };
    };
    prefix_means<T>(
        call.key_shape(), visible.count, weight_in(saved.query_weights),
        [&](Index r) { return call.inputs.query.row(visible.token[r]); }, query,
        [&]<class P>(Index r, Index own, Index shared, const P& mean) {
          pstoreu(p.row(r) + own, pmul(mean, ploadu<P>(call.inputs.key.row(visible.token[r]) + shared)));
        });
    prefix_means<T>(
        call.key_shape(), visible.count, weight_in(saved.key_weights), [&](Index r) { return p.row(r); }, key,
        [](Index, Index, Index, const auto&) {});
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
  PrefixBackward(const AdditiveCall<T>& call, const AdditiveGradients<T>& grad, Index s, Scratch& scratch)
      : call_(call),
        grad_(grad),
        shape_(call.key_shape()),
        stretch_(call.stretches[s]),
        visible_(call, stretch_),
        mean_(call, grad.saved, s, visible_, scratch),
        grad_rows_(scratch.take<T>(visible_.count * call.width()), visible_.count, call.width(), call.width()),
        grad_scores_(scratch.take<T>(prefix_stretch * shape_.padded())) {
    list_rows_of_keys(scratch);
    list_rows_of_queries();
  }

  /// What the rows of out leave for the keys before the stretch.
  void leave_for_keys(const SuffixSums<T>& own) { of_keys_.leave(shape_, own); }

  /// Writes the gradients of values and finds those of p. `after` is what all rows behind leave for the keys.
  void keys(const SuffixSums<T>& after, T* grad_weights) {
    write(grad_.inputs.value, [&](auto store) { of_keys_.go_back(shape_, after, store); });
    scores_backward(0, call_.w_k, mean_.p, grad_weights, {}, grad_rows_, Keep{});
  }

  /// What the rows of p leave for the queries before the stretch.
  void leave_for_queries(const SuffixSums<T>& own) { of_queries_.leave(shape_, own); }

  /// Writes the gradients of keys and queries. `after` is what all rows behind leave for the queries.
  void queries(const SuffixSums<T>& after, T* grad_weights) {
    write(grad_.inputs.key, [&](auto store) { of_queries_.go_back(shape_, after, store); });
    write(grad_.inputs.query, [&](auto store) {
      for_each_run(
          0, stretch_.count, [&](Index i) { return visible_.at[i]; },
          [&](Index i, Index count) {
            const auto run = [&](auto tokens) { return tokens.middle_rows(stretch_.first + i, count); };
            scores_backward(visible_.seen[i] - 1, call_.w_q, run(call_.inputs.query), grad_weights,
                            call_.add_query ? run(grad_.out) : Tokens<const T>{}, run(grad_.inputs.query), store);
          },
          [&](Index i) {
            T* const row = grad_.inputs.query.row(stretch_.first + i);
            call_.add_query ? std::copy_n(grad_.out.row(stretch_.first + i), call_.width(), row)
                            : std::fill_n(row, call_.width(), T(0));
          });
    });
  }

 private:
  /// Calls visit(store) with what stores the stretch's rows of a gradient, which are asked for in order, as in
  /// PrefixMeans, unless they go past the caches.
  template <class Visit>
  void write(Tokens<T> rows, Visit&& visit) const {
    const bool past = past_caches(rows, shape_.dim);
    for (Index i = stretch_.first; i < stretch_.end() && !past; ++i) prefetch_row<T>(rows.row(i), rows.cols());
    with_store(past, visit);
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
      if (!read) std::fill_n(grad_.inputs.value.row(token), call_.heads.value_cols(), T(0));
      of_keys_.weight[i] = grad_.saved.key_weights.row(token).data();
      of_keys_.mean[i] = mean_.key.row(row + 1);
      of_keys_.factor[i] = read ? call_.inputs.value.row(token) : zeros;
      of_keys_.grad[i] = read ? grad_.u.row(token) : zeros;
      of_keys_.grad_factor[i] = read ? grad_.inputs.value.row(token) : unused;
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
      of_queries_.grad_factor[r] = grad_.inputs.key.row(token);
      of_queries_.x[r] = call_.inputs.query.row(token);
      of_queries_.grad_x[r] = grad_rows_.row(r);
      of_queries_.grad_score[r] = grad_scores_ + r * shape_.padded();
    }
    for (Index i = 0; i < stretch_.count; ++i) {
      if (!visible_.at[i]) std::fill_n(grad_.inputs.key.row(stretch_.first + i), call_.heads.key_cols(), T(0));
    }
  }

  /// Adds what reaches rows of x through their scores to what stands in grad_rows_ from row `first` on, and to `start`
  /// unless that is empty; `store` takes the sum to grad_x.
  template <class Store>
  void scores_backward(Index first, const T* weights, Tokens<const T> x, T* grad_weights, Tokens<const T> start,
                       Tokens<T> grad_x, Store&& store) const {
    score_rows_backward(
        call_.query_shape(), weights, grad_scores_ + first * shape_.padded(), x.rows(), x.data(), x.stride(),
        grad_weights, {},
        // By value: what a reference reads would be read again after each store, which might have changed it.
        [from = grad_rows_.row(first), stride = grad_rows_.stride(), start](auto by, Index i, Index c) {
          using P = typename decltype(by)::template Of<T>;
          const P sum = ploadu<P>(from + i * stride + c);
          return start.data() == nullptr ? sum : P(padd(sum, ploadu<P>(start.row(i) + c)));
        },
        [store, grad_x](Index i, Index c, const auto& sum) { store(grad_x.row(i) + c, sum); });
  }

  const AdditiveCall<T>& call_;
  const AdditiveGradients<T>& grad_;
  PoolingShape shape_;
  const Stretch& stretch_;
  Visible visible_;
  PrefixMeans<T> mean_;
  PrefixRows<T> of_keys_;
  PrefixRows<T> of_queries_;
  Tokens<T> grad_rows_;  ///< of p, then of the queries, but for what reaches these through their scores
  T* grad_scores_;
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
    PrefixBackward<T> stretch(call, grad, s, scratch);
    // What the first stretch of a sequence leaves, nobody takes.
    const bool leaves = s != stretches.of(stretches[s].sequence).first;
    if (leaves) stretch.leave_for_keys(own_keys);
    to_keys.take(s, own_keys, after);
    stretch.keys(after, grad_w_k);
    if (leaves) stretch.leave_for_queries(own_queries);
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
