#pragma once

#include <nearfar/engine/additive_prefix.hpp>
#include <nearfar/engine/softmax_pooling_backward.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

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
