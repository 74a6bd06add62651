#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/detail/transpose.hpp>
#include <nearfar/engine/microkernel.hpp>
#include <nearfar/engine/softmax/key_tile.hpp>
#include <nearfar/engine/softmax/lane_mask.hpp>
#include <nearfar/engine/softmax/panel_keys.hpp>
#include <nearfar/engine/softmax/panels.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>

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
/// (FlashAttention, arXiv 2205.14135, algorithm 4). Queries lie on the lanes for the first three products, in panels of
/// `width`, features for the last two, which therefore read rows of q and grad_out as they stand.
template <class T>
class GradientTile {
 public:
  static constexpr Index width = panel_vectors * lanes<T>;
  static constexpr Index capacity = 240 / width * width;

  /// How many queries, from number `first` on, it takes where those of a `block` see alike.
  static Index fitting(Index first, Index block) { return Panels<T>::fitting(capacity / width, first, block); }

  GradientTile(Scratch& scratch, Index dim, Index value_dim)
      : dim_(dim),
        value_dim_(value_dim),
        query_stride_(round_up(dim, lanes<T>)),
        grad_out_stride_(round_up(value_dim, lanes<T>)),
        panels_(scratch, capacity / width),
        query_lanes_(scratch.take<T>(capacity * dim)),
        grad_out_lanes_(scratch.take<T>(capacity * value_dim)),
        grad_query_lanes_(scratch.take<T>(capacity * round_up(dim, group_rows))),
        query_rows_(scratch.take<T>(capacity * query_stride_)),
        grad_out_rows_(scratch.take<T>(capacity * grad_out_stride_)),
        shift_(scratch.take<T>(capacity)),
        shift_rest_(scratch.take<T>(capacity)),
        delta_(scratch.take<T>(capacity)),
        weight_(scratch.take<T>(KeyTile<T>::capacity * width)),
        grad_score_(scratch.take<T>(KeyTile<T>::capacity * width)),
        grad_key_(scratch.take<T>(KeyTile<T>::capacity * query_stride_)),
        grad_value_(scratch.take<T>(KeyTile<T>::capacity * grad_out_stride_)) {
    rows_ahead_.and_then(&lookahead_);
  }

  GradientTile(const GradientTile&) = delete;
  GradientTile& operator=(const GradientTile&) = delete;

  /// Takes at most `capacity` queries, the first of them number `first` of its sequence, with their log-sum-exp and
  /// delta; their gradient is zero so far. Where the queries of a `block` see the same keys, or most of them, at most
  /// fitting(first, block).
  template <class Storage>
  void load(Tokens<const Storage> query, Tokens<const Storage> grad_out, Index first, const double* log_sum_exp,
            const T* delta, double scale, Index block = Window::unlimited) {
    first_ = first;
    scale_ = T(scale);
    panels_.cut(first, query.rows(), block);
    for (Index p = 0; p < panels_.count(); ++p) {
      const Index row = panels_.begin(p);
      const Index place = p * width;
      take_panel(query.middle_rows(row, panels_.size(p)), log2_scale<T>(scale), query_rows_ + place * query_stride_,
                 query_stride_, query_lanes_ + place * dim_);
      take_panel(grad_out.middle_rows(row, panels_.size(p)), T(1), grad_out_rows_ + place * grad_out_stride_,
                 grad_out_stride_, grad_out_lanes_ + place * value_dim_);
      for (Index i = 0; i < round_up(panels_.size(p), lanes<T>); ++i) {
        const Shift<T> shift = i < panels_.size(p) ? Shift<T>(log_sum_exp[row + i]) : Shift<T>();
        shift_[place + i] = shift.nearest;
        shift_rest_[place + i] = shift.rest;
        delta_[place + i] = shift.sees() ? delta[row + i] : T(0);
      }
    }
    std::fill_n(grad_query_lanes_, panels_.count() * width * round_up(dim_, group_rows), T(0));
  }

  /// Walks back over the keys of a tile. The gradients of key j of the tile are added to the rows grad_key(j) and
  /// grad_value(j), of `dim` and `value_dim` numbers, or where j is among the `fresh` written to them.
  template <Visibility B, class GradKey, class GradValue>
  void visit(KeyTile<T>& keys, const B& band, Range fresh, GradKey&& grad_key, GradValue&& grad_value) {
    keys.complete();
    // Whether the gradients of a group of keys hold anything yet: the first products are written, not added.
    bool begun[KeyTile<T>::capacity / group_rows] = {};
    rows_ahead_.clear();
    Index fetched = 0;
    // The gradients of the keys, which are added to at the end, a group of them at a time.
    const auto fetch_group = [&] {
      if (!rows_ahead_.done()) return;
      rows_ahead_.clear();
      for (const Index end = std::min<Index>(fetched + group_rows, keys.count()); fetched < end; ++fetched) {
        rows_ahead_.add(grad_key(fetched), 0, 1, dim_);
        rows_ahead_.add(grad_value(fetched), 0, 1, value_dim_);
      }
    };
    for (Index p = 0; p < panels_.count(); ++p) {
      const Index first = first_ + panels_.begin(p);
      const PanelKeys seen(keys, band, first, panels_.size(p));
      seen.for_each_stretch([&](auto vectors, int vector, Range range, Range all) {
        score<vectors>(p, vector, keys, range);
        for (int v = vector; v < vector + vectors; ++v) {
          hide(LaneMask<T, B>{band, keys, first + v * lanes<T>}, range, all, weight_ + v * lanes<T>, width,
               [](const Packet<T>&) {});
        }
      });
      for (int v = 0; v < panel_vectors; ++v) weigh(p, v, seen.any(v));
      seen.for_each_stretch([&](auto vectors, int vector, Range range, Range) {
        grad_scores<vectors>(p, vector, keys, range);
        grad_queries<vectors>(p, vector, keys, range);
        for (Index j = range.first; j < range.end; j += group_rows) {
          fetch_group();
          const Index query = p * width + vector * lanes<T>;
          const Index place = j * width + vector * lanes<T>;
          bool& add = begun[j / group_rows];
          add_rows<vectors>(weight_ + place, grad_out_rows_ + query * grad_out_stride_, grad_out_stride_,
                            grad_value_ + j * grad_out_stride_, add);
          add_rows<vectors>(grad_score_ + place, query_rows_ + query * query_stride_, query_stride_,
                            grad_key_ + j * query_stride_, add);
          add = true;
        }
      });
    }
    for (Index j = 0; j < keys.count(); ++j) {
      const bool write = fresh.first <= j && j < fresh.end;
      if (!begun[j / group_rows]) {
        if (!write) continue;
        std::fill_n(grad_key(j), dim_, 0);
        std::fill_n(grad_value(j), value_dim_, 0);
      } else {
        take_row(grad_key_ + j * query_stride_, dim_, scale_, write, grad_key(j));
        take_row(grad_value_ + j * grad_out_stride_, value_dim_, T(1), write, grad_value(j));
      }
    }
  }

  /// Writes the gradients of the queries.
  void finish(Tokens<T> grad_query) const {
    for (Index p = 0; p < panels_.count(); ++p) {
      transpose(grad_query_lanes(p), width, dim_, panels_.size(p), scale_, grad_query.row(panels_.begin(p)),
                grad_query.stride());
    }
  }

  /// What will be read after the next visit, fetched during it. The gradients that a visit adds to it fetches by
  /// itself.
  Lookahead& lookahead() { return lookahead_; }

 private:
  T* grad_query_lanes(Index p) const { return grad_query_lanes_ + p * width * round_up(dim_, group_rows); }

  // Takes the rows of a panel as they are, each followed by zeros up to `stride`, and times a factor on the lanes; zero
  // rows complete the last vector.
  template <class Storage>
  static void take_panel(Tokens<const Storage> from, T factor, T* rows, Index stride, T* on_lanes) {
    const Index count = round_up(from.rows(), lanes<T>);
    for (Index i = 0; i < count; ++i) {
      T* row = rows + i * stride;
      const Index cols = i < from.rows() ? from.cols() : 0;
      for (Index c = 0; c < cols; ++c) row[c] = T(from(i, c));
      std::fill(row + cols, row + stride, T(0));
    }
    transpose(rows, stride, count, from.cols(), factor, on_lanes, width);
  }

  // The scores of Vectors vectors of a panel, from `vector` on.
  template <int Vectors>
  void score(Index p, Index vector, const KeyTile<T>& keys, Range range) {
    T* scores = weight_ + range.first * width + vector * lanes<T>;
    multiply_groups<group_rows, Vectors>(
        keys.key(range.first), range.count(), query_lanes_ + p * width * dim_ + vector * lanes<T>, width, dim_,
        [&](Index j, int) { return pset1<Packet<T>>(keys.bias(range.first + j)); },
        [&](Index j, int v, const Packet<T>& product) { pstoreu(scores + j * width + v * lanes<T>, product); },
        Pace{lookahead_, fetch_pace});
  }

  // Turns the scores of a vector into weights. Not where the scores are finished: exp2's constants would take the
  // registers that the product needs.
  void weigh(Index p, Index vector, Range range) {
    constexpr int rows = weights_at_once;
    const Packet<T> shift = ploadu<Packet<T>>(shift_ + p * width + vector * lanes<T>);
    const Packet<T> rest = ploadu<Packet<T>>(shift_rest_ + p * width + vector * lanes<T>);
    for (Index j = range.first; j < range.end; j += rows) {
      T* scores = weight_ + j * width + vector * lanes<T>;
      Packet<T> weight[rows];
      NEARFAR_UNROLL for (int i = 0; i < rows; ++i) {
        weight[i] = weight_exponent(ploadu<Packet<T>>(scores + i * width), shift, rest);
      }
      exp2<T>(weight);
      NEARFAR_UNROLL for (int i = 0; i < rows; ++i) pstoreu(scores + i * width, weight[i]);
    }
  }

  // The gradients of the scores from their weights.
  template <int Vectors>
  void grad_scores(Index p, Index vector, const KeyTile<T>& keys, Range range) {
    const T* delta = delta_ + p * width + vector * lanes<T>;
    const Index first = range.first * width + vector * lanes<T>;
    multiply_groups<group_rows, Vectors>(
        keys.value(range.first), range.count(), grad_out_lanes_ + p * width * value_dim_ + vector * lanes<T>, width,
        value_dim_, [&](Index, int) { return pset1<Packet<T>>(T(0)); },
        [&](Index j, int v, const Packet<T>& grad_weight) {
          const Index place = first + j * width + v * lanes<T>;
          const Packet<T> grad = psub(grad_weight, ploadu<Packet<T>>(delta + v * lanes<T>));
          pstoreu(grad_score_ + place, pmul(ploadu<Packet<T>>(weight_ + place), grad));
        },
        Pace{lookahead_, fetch_pace});
  }

  template <int Vectors>
  void grad_queries(Index p, Index vector, const KeyTile<T>& keys, Range range) {
    T* grad_query = grad_query_lanes(p) + vector * lanes<T>;
    multiply_groups<group_rows, Vectors>(
        keys.key_transposed(range.first), keys.key_stride(), grad_score_ + range.first * width + vector * lanes<T>,
        width, range.count(), [&](Index c, int v) { return ploadu<Packet<T>>(grad_query + c * width + v * lanes<T>); },
        [&](Index c, int v, const Packet<T>& sum) { pstoreu(grad_query + c * width + v * lanes<T>, sum); },
        Pace{lookahead_, fetch_pace});
  }

  // Adds factor * row, or writes it.
  template <class Storage>
  static void take_row(const T* row, Index count, T factor, bool write, Storage* to) {
    if (write) {
      for (Index c = 0; c < count; ++c) to[c] = static_cast<Storage>(factor * row[c]);
    } else {
      for (Index c = 0; c < count; ++c) to[c] += static_cast<Storage>(factor * row[c]);
    }
  }

  // sums(j) = sum_i factor(j, i) row(i) over the queries i of Vectors vectors, or added to, for a group of keys j.
  template <int Vectors>
  void add_rows(const T* factor, const T* rows, Index stride, T* sums, bool add) {
    for_each_panel<T>(stride, [&](auto features, Index column) {
      multiply_groups<group_rows, features>(
          Broadcast<T>{factor, width, 1}, group_rows, rows + column, stride, Vectors * lanes<T>,
          [&](Index j, int v) {
            return add ? ploadu<Packet<T>>(sums + j * stride + column + v * lanes<T>) : pset1<Packet<T>>(T(0));
          },
          [&](Index j, int v, const Packet<T>& sum) { pstoreu(sums + j * stride + column + v * lanes<T>, sum); },
          Pace{rows_ahead_, fetch_pace});
    });
  }

  Index dim_;
  Index value_dim_;
  Index query_stride_;
  Index grad_out_stride_;
  Panels<T> panels_;
  Index first_ = 0;
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
  Lookahead lookahead_;
  Lookahead rows_ahead_;  // gradients of keys, then the lookahead
};

/// Into how many segments the backward pass cuts the `tokens` of a sequence where there are `tasks` tasks besides: by
/// shapes alone.
inline Index gradient_segments(Index tokens, Index tasks) {
  constexpr Index enough_tasks = 16;
  constexpr Index shortest_segment = 512;
  return std::clamp<Index>(tokens / shortest_segment, 1, std::max<Index>(enough_tasks / tasks, 1));
}

/// delta_i = grad_out_i . out_i of each head (heads.query x n_q): what the softmax of a row takes off every gradient of
/// its scores.
template <class Scalar, class T>
void softmax_delta(Work& work, const Heads& heads, Tokens<const Scalar> out, Tokens<const Scalar> grad_out, T* delta) {
  constexpr Index rows = 1024;
  const Index width = heads.value_width();
  work.for_each(ceil_div(out.rows(), rows), [&](Index task, Scratch&) {
    for (Index i = task * rows; i < std::min((task + 1) * rows, out.rows()); ++i) {
      for (Index h = 0; h < heads.query; ++h) {
        const auto features = [&](const auto& tokens) {
          return tokens.matrix().row(i).segment(h * width, width).array().template cast<T>();
        };
        delta[h * out.rows() + i] = (features(out) * features(grad_out)).sum();
      }
    }
  });
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
