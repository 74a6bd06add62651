#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/engine/key_tile.hpp>
#include <nearfar/engine/lane_mask.hpp>
#include <nearfar/engine/microkernel.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>
#include <array>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// A tile of queries on its walk back over the key tiles that it attended to.
///
/// With the saved log-sum-exp L_i and delta_i = grad_out_i . out_i, a visit takes the weights again from the scores and
/// gives the gradients of all three:
///
///   p_ij = 2^(s_ij - L_i)          ds_ij = p_ij (grad_out_i . v_j - delta_i)
///   grad_q_i += scale sum_j ds_ij k_j      grad_k_j += scale sum_i ds_ij q_i      grad_v_j += sum_i p_ij grad_out_i
///
/// (FlashAttention, arXiv 2205.14135, algorithm 4). Queries lie on the lanes for the first three products, features for
/// the last two, which therefore read rows of q and grad_out as they stand.
template <class T>
class GradientTile {
 public:
  static constexpr int vectors = 2;
  static constexpr Index width = vectors * lanes<T>;
  static constexpr Index capacity = 256;

  GradientTile(Scratch& scratch, Index dim, Index value_dim)
      : dim_(dim),
        value_dim_(value_dim),
        query_stride_(round_up(dim, lanes<T>)),
        grad_out_stride_(round_up(value_dim, lanes<T>)),
        query_lanes_(scratch.take<T>(capacity * dim)),
        grad_out_lanes_(scratch.take<T>(capacity * value_dim)),
        grad_query_lanes_(scratch.take<T>(capacity * dim)),
        query_rows_(scratch.take<T>(capacity * query_stride_)),
        grad_out_rows_(scratch.take<T>(capacity * grad_out_stride_)),
        shift_(scratch.take<T>(capacity)),
        shift_rest_(scratch.take<T>(capacity)),
        delta_(scratch.take<T>(capacity)),
        weight_(scratch.take<T>(KeyTile<T>::capacity * capacity)),
        grad_score_(scratch.take<T>(KeyTile<T>::capacity * capacity)),
        grad_key_(scratch.take<T>(KeyTile<T>::capacity * query_stride_)),
        grad_value_(scratch.take<T>(KeyTile<T>::capacity * grad_out_stride_)) {}

  /// Takes at most `capacity` queries, the first of them number `first` of its sequence, with their log-sum-exp and
  /// delta; their gradient is zero so far.
  template <class Storage>
  void load(Tokens<const Storage> query, Tokens<const Storage> grad_out, Index first, const double* log_sum_exp,
            const T* delta, T scale) {
    first_ = first;
    count_ = query.rows();
    scale_ = scale;
    to_lanes(query, scale * log2_e<T>, query_lanes_);
    to_lanes(grad_out, T(1), grad_out_lanes_);
    copy_rows(query, query_rows_, query_stride_);
    copy_rows(grad_out, grad_out_rows_, grad_out_stride_);
    std::fill_n(grad_query_lanes_, panels() * width * dim_, T(0));
    for (Index i = 0; i < panels() * width; ++i) {
      // A query that saw nothing, or is not there, weighs every key with 2^(s - infinity) = 0.
      const bool sees = i < count_ && log_sum_exp[i] != -infinity<double>;
      const double shift = sees ? log2_e<double> * log_sum_exp[i] : infinity<double>;
      shift_[i] = T(shift);
      // What the shift loses as a T would be a relative error of all weights.
      shift_rest_[i] = sees ? T(shift - double{shift_[i]}) : T(0);
      delta_[i] = sees ? delta[i] : T(0);
    }
  }

  /// Walks back over the keys of a tile. The gradients of key j of the tile go to add(j, grad_key, grad_value), two
  /// rows of `dim` and `value_dim` numbers.
  template <class Band, class Add>
  void visit(const KeyTile<T>& keys, const Band& band, Add&& add) {
    for (Index p = 0; p < panels(); ++p) {
      Range& any = seen_[static_cast<std::size_t>(p)];
      any = keys.within(band.seen_by_any(first_ + p * width, in_panel(p)));
      if (any.count() == 0) continue;
      const Range all = keys.within(band.seen_by_all(first_ + p * width, in_panel(p)));
      if (all.first <= any.first && any.end <= all.end) {
        score(p, keys, any, AllSeen{});
      } else {
        score(p, keys, any, LaneMask<T, Band>{band, keys, first_ + p * width});
      }
      grad_scores(p, keys, any);
      grad_queries(p, keys, any);
    }
    for (Index first = 0; first < keys.count(); first += key_group) {
      grad_keys({first, std::min(first + key_group, keys.count())}, std::forward<Add>(add));
    }
  }

  /// Adds the gradients of the queries to the rows of grad_query.
  template <class Storage>
  void finish(Tokens<Storage> grad_query) {
    for (Index p = 0; p < panels(); ++p) {
      // The rows of q are no longer needed: they make room for the gradient in their own layout.
      transpose(grad_query_lanes_ + p * width * dim_, width, dim_, in_panel(p), scale_, query_rows_, query_stride_);
      for (Index i = 0; i < in_panel(p); ++i) {
        const T* from = query_rows_ + i * query_stride_;
        Storage* to = grad_query.row(p * width + i);
        for (Index c = 0; c < dim_; ++c) to[c] += Storage(from[c]);
      }
    }
  }

  /// What the next visit will read, fetched during this one.
  Lookahead& lookahead() { return lookahead_; }

 private:
  // Keys whose gradients are taken at once. Those of a group sum over the same queries, so a short group skips more of
  // the queries that see none of it.
  static constexpr Index key_group = 32;

  Index panels() const { return (count_ + width - 1) / width; }
  Index in_panel(Index p) const { return std::min(width, count_ - p * width); }

  template <class Storage>
  void to_lanes(Tokens<const Storage> rows, T factor, T* to) {
    for (Index p = 0; p < panels(); ++p) {
      T* panel = to + p * width * rows.cols();
      if (in_panel(p) < width) std::fill_n(panel, width * rows.cols(), T(0));
      transpose(rows.row(p * width), rows.stride(), in_panel(p), rows.cols(), factor, panel, width);
    }
  }

  template <class Storage>
  void copy_rows(Tokens<const Storage> rows, T* to, Index to_stride) {
    for (Index i = 0; i < count_; ++i) {
      std::copy_n(rows.row(i), rows.cols(), to + i * to_stride);
      std::fill(to + i * to_stride + rows.cols(), to + (i + 1) * to_stride, T(0));
    }
    std::fill(to + count_ * to_stride, to + panels() * width * to_stride, T(0));
  }

  // Row j of weights and of score gradients holds the tile's queries side by side.
  static Index at(Index j, Index p) { return j * capacity + p * width; }

  template <class Mask>
  void score(Index p, const KeyTile<T>& keys, Range range, Mask&& mask) {
    multiply<vectors>(
        keys.key(range.first), range.count(), query_lanes_ + p * width * dim_, width, dim_,
        [&](Index j, int v) {
          if (v == 0) lookahead_.step();
          return pset1<Packet<T>>(keys.bias(range.first + j));
        },
        [&](Index j, int v, const Packet<T>& product) {
          pstoreu(weight_ + at(range.first + j, p) + v * lanes<T>, mask(range.first + j, v, product));
        });
  }

  void grad_scores(Index p, const KeyTile<T>& keys, Range range) {
    Packet<T> shift[vectors];
    Packet<T> rest[vectors];
    Packet<T> delta[vectors];
    NEARFAR_UNROLL for (int v = 0; v < vectors; ++v) {
      shift[v] = ploadu<Packet<T>>(shift_ + p * width + v * lanes<T>);
      rest[v] = ploadu<Packet<T>>(shift_rest_ + p * width + v * lanes<T>);
      delta[v] = ploadu<Packet<T>>(delta_ + p * width + v * lanes<T>);
    }
    multiply<vectors>(
        keys.value(range.first), range.count(), grad_out_lanes_ + p * width * value_dim_, width, value_dim_,
        [&](Index, int) { return pset1<Packet<T>>(T(0)); },
        [&](Index j, int v, const Packet<T>& grad_weight) {
          const Index place = at(range.first + j, p) + v * lanes<T>;
          const Packet<T> score = ploadu<Packet<T>>(weight_ + place);
          const Packet<T> weight = exp2<T>(psub(psub(score, shift[v]), rest[v]));
          pstoreu(weight_ + place, weight);
          pstoreu(grad_score_ + place, pmul(weight, psub(grad_weight, delta[v])));
        });
  }

  void grad_queries(Index p, const KeyTile<T>& keys, Range range) {
    T* grad_query = grad_query_lanes_ + p * width * dim_;
    multiply<vectors>(
        keys.key_transposed(range.first), dim_, grad_score_ + at(range.first, p), capacity, range.count(),
        [&](Index c, int v) { return ploadu<Packet<T>>(grad_query + c * width + v * lanes<T>); },
        [&](Index c, int v, const Packet<T>& sum) { pstoreu(grad_query + c * width + v * lanes<T>, sum); });
  }

  template <class Add>
  void grad_keys(Range group, Add&& add) {
    const auto sees = [&](Index p) {
      const Range seen = seen_[static_cast<std::size_t>(p)];
      return seen.first < group.end && group.first < seen.end;
    };
    Index from = 0;
    Index to = panels();
    while (from < to && !sees(from)) ++from;
    while (from < to && !sees(to - 1)) --to;
    if (from == to) return;
    for (Index p = from; p < to; ++p) clear_unseen(p, group);
    const Index depth = (to - from) * width;
    sum_rows(weight_ + at(group.first, from), group.count(), grad_out_rows_ + from * width * grad_out_stride_,
             grad_out_stride_, depth, grad_value_);
    sum_rows(grad_score_ + at(group.first, from), group.count(), query_rows_ + from * width * query_stride_,
             query_stride_, depth, grad_key_);
    for (Index j = 0; j < group.count(); ++j) {
      T* grad_key = grad_key_ + j * query_stride_;
      for (Index c = 0; c < dim_; ++c) grad_key[c] *= scale_;
      add(group.first + j, static_cast<const T*>(grad_key), static_cast<const T*>(grad_value_ + j * grad_out_stride_));
    }
  }

  // The keys of a group that a panel did not visit weigh nothing there.
  void clear_unseen(Index p, Range group) {
    const Range seen = seen_[static_cast<std::size_t>(p)];
    for (Index j = group.first; j < group.end; ++j) {
      if (seen.first <= j && j < seen.end) continue;
      std::fill_n(weight_ + at(j, p), width, T(0));
      std::fill_n(grad_score_ + at(j, p), width, T(0));
    }
  }

  // sums(j) = sum_i factor(j, i) row(i)
  static void sum_rows(const T* factor, Index count, const T* rows, Index stride, Index depth, T* sums) {
    for_each_panel<T>(stride, [&](auto panel, Index c) {
      multiply<decltype(panel)::value>(
          Broadcast<T>{factor, capacity, 1}, count, rows + c, stride, depth,
          [](Index, int) { return pset1<Packet<T>>(T(0)); },
          [&](Index j, int v, const Packet<T>& sum) { pstoreu(sums + j * stride + c + v * lanes<T>, sum); });
    });
  }

  Index dim_;
  Index value_dim_;
  Index query_stride_;
  Index grad_out_stride_;
  Index first_ = 0;
  Index count_ = 0;
  T scale_ = 1;
  T* query_lanes_;
  T* grad_out_lanes_;
  T* grad_query_lanes_;
  T* query_rows_;
  T* grad_out_rows_;
  T* shift_;
  T* shift_rest_;
  T* delta_;
  T* weight_;
  T* grad_score_;
  T* grad_key_;
  T* grad_value_;
  std::array<Range, static_cast<std::size_t>(capacity / width)> seen_{};
  Lookahead lookahead_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
