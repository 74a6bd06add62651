#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/engine/key_tile.hpp>
#include <nearfar/engine/lane_mask.hpp>
#include <nearfar/engine/microkernel.hpp>
#include <nearfar/engine/panel_keys.hpp>
#include <nearfar/mask.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// A tile of queries that walks over key tiles, holding the online softmax of what it has seen.
///
/// Queries lie on the vector lanes, in panels of `width`: scores are S^T = K Q^T and values O^T = V^T P^T, so that K
/// and V are read number by number as they stand, row maxima and sums need no work across lanes, and only Q is
/// transposed on the way in and O on the way out. A panel's scores over one key tile stay in the first-level cache.
template <class T>
class QueryTile {
 public:
  /// Two vectors a panel: they share the numbers that the microkernel broadcasts.
  static constexpr int vectors = 2;
  using Panel = OnlineSoftmax<T, vectors>;
  static constexpr Index width = Panel::width;

  /// Room for `capacity` queries of `dim` features against values of `value_dim`.
  QueryTile(Scratch& scratch, Index capacity, Index dim, Index value_dim)
      : dim_(dim),
        value_dim_(value_dim),
        query_(scratch.take<T>(round_up(capacity, width) * dim)),
        state_(scratch.take<T>(round_up(capacity, width) * (value_dim + 2))),
        scores_(scratch.take<T>(KeyTile<T>::capacity * width)) {}

  /// Takes `count` queries, the first of them number `first` of its sequence, times `factor`; sees no key yet.
  template <class Storage>
  void load(const Storage* rows, Index stride, Index first, Index count, T factor) {
    first_ = first;
    count_ = count;
    for (Index p = 0; p < panels(); ++p) {
      if (in_panel(p) < width) std::fill_n(query(p), width * dim_, T(0));
      transpose(rows + p * width * stride, stride, in_panel(p), dim_, factor, query(p), width);
      panel(p).start();
    }
  }

  /// Attends to the keys of the tile that the band, or whatever else answers as Band does, lets each query see. Only
  /// where the band's edges cross a panel are its queries told apart; keys that one of its vectors alone can see do not
  /// meet the other.
  template <class Band>
  void visit(const KeyTile<T>& keys, const Band& band) {
    for (Index p = 0; p < panels(); ++p) {
      const PanelKeys seen(keys, band, first_ + p * width, in_panel(p), 4);
      if (seen.any.count() == 0) continue;
      Packet<T> max[vectors] = {pset1<Packet<T>>(-infinity<T>), pset1<Packet<T>>(-infinity<T>)};
      score<1>(p, 0, keys, seen.before());
      score<vectors>(p, 0, keys, {seen.shared.first, seen.all.first});
      score<vectors>(p, 0, keys, seen.all, max);
      score<vectors>(p, 0, keys, {seen.all.end, seen.shared.end});
      score<1>(p, 1, keys, seen.after());
      const LaneMask<T, Band> mask{band, keys, first_ + p * width};
      hide(mask, {seen.any.first, seen.all.first}, max);
      hide(mask, {seen.all.end, seen.any.end}, max);
      take(p, keys, seen, max);
    }
  }

  /// Starts each query where attention to other keys, already finished, has left it: query i where row i / children of
  /// `out` stands with its log-sum-exp.
  void start_from(const T* out, Index stride, const double* log_sum_exp, Index children) {
    for (Index p = 0; p < panels(); ++p) {
      const Panel softmax = panel(p);
      const Index first = first_ + p * width;
      const Index last = first + in_panel(p) - 1;
      for (Index lane = 0; lane < width; ++lane) {
        const Index parent = std::min(first + lane, last) / children;
        const bool empty = log_sum_exp[parent] == -infinity<double>;
        softmax.max[lane] = empty ? -infinity<T> : T(log2_e<double> * log_sum_exp[parent]);
        softmax.sum[lane] = empty ? T(0) : T(1);
      }
      for (Index lane = 0; lane < width; lane += lanes<T>) {
        const T* row = out + std::min(first + lane, last) / children * stride;
        T* value = softmax.value + lane;
        if (row == out + std::min(first + lane + lanes<T> - 1, last) / children * stride) {
          for (Index c = 0; c < value_dim_; ++c) pstoreu(value + c * width, pset1<Packet<T>>(row[c]));
          continue;
        }
        for (Index i = 0; i < lanes<T>; ++i) {
          row = out + std::min(first + lane + i, last) / children * stride;
          for (Index c = 0; c < value_dim_; ++c) value[c * width + i] = row[c];
        }
      }
    }
  }

  /// Writes the result of each query to its row of out, times a factor a feature unless that is null, and its
  /// log-sum-exp beside where that is not null.
  template <class Storage>
  void finish(Storage* out, Index stride, double* log_sum_exp, const T* factor = nullptr) {
    for (Index p = 0; p < panels(); ++p) {
      panel(p).finish(in_panel(p), out + p * width * stride, stride,
                      log_sum_exp == nullptr ? nullptr : log_sum_exp + p * width, factor);
    }
  }

  /// What the next visit will read, fetched during this one.
  Lookahead& lookahead() { return lookahead_; }

  Index panels() const { return (count_ + width - 1) / width; }
  Index in_panel(Index p) const { return std::min(width, count_ - p * width); }

  Panel panel(Index p) const {
    T* state = state_ + p * width * (value_dim_ + 2);
    return {state, state + width, state + 2 * width, value_dim_};
  }

 private:
  T* query(Index p) const { return query_ + p * width * dim_; }

  // The scores of Vectors vectors of a panel, from `vector` on, against some keys, kept at scores_ a row a key; and
  // their maxima, where these are asked for.
  template <int Vectors>
  void score(Index p, Index vector, const KeyTile<T>& keys, Range range, Packet<T>* max = nullptr) {
    if (range.count() == 0) return;
    T* scores = scores_ + range.first * width + vector * lanes<T>;
    Packet<T> largest[Vectors];
    NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) largest[v] = pset1<Packet<T>>(-infinity<T>);
    multiply<Vectors>(
        keys.key(range.first), range.count(), query(p) + vector * lanes<T>, width, dim_,
        [&](Index j, int) {
          lookahead_.step();
          return pset1<Packet<T>>(keys.bias(range.first + j));
        },
        [&](Index j, int v, const Packet<T>& product) {
          largest[v] = pmax(largest[v], product);
          pstoreu(scores + j * width + v * lanes<T>, product);
        });
    if (max != nullptr) std::copy_n(largest, Vectors, max);
  }

  // Hides scores of keys that not every query sees, those of vectors that were not scored among them, and takes what is
  // left into the maxima.
  template <class Mask>
  void hide(const Mask& mask, Range range, Packet<T> (&max)[vectors]) {
    for (Index j = range.first; j < range.end; ++j) {
      for (int v = 0; v < vectors; ++v) {
        T* score = scores_ + j * width + v * lanes<T>;
        const Packet<T> masked = mask(j, v, ploadu<Packet<T>>(score));
        max[v] = pmax(max[v], masked);
        pstoreu(score, masked);
      }
    }
  }

  // Takes scored keys and their values into the softmax of a panel.
  void take(Index p, const KeyTile<T>& keys, const PanelKeys& seen, const Packet<T> (&max)[vectors]) {
    Panel softmax = panel(p);
    Packet<T> correction[vectors];
    softmax.update(scores_ + seen.any.first * width, seen.any.count(), max, correction);
    add_values<vectors>(softmax, 0, keys, seen.shared, correction);
    const Packet<T> one = pset1<Packet<T>>(T(1));
    if (seen.before().count() > 0) add_values<1>(softmax, 0, keys, seen.before(), &one);
    if (seen.after().count() > 0) add_values<1>(softmax, 1, keys, seen.after(), &one);
  }

  // value = factor * value + what some keys add, for Vectors vectors of a panel from `vector` on.
  template <int Vectors>
  void add_values(const Panel& softmax, Index vector, const KeyTile<T>& keys, Range range, const Packet<T>* factor) {
    multiply<Vectors>(
        keys.value_transposed(range.first), value_dim_, scores_ + range.first * width + vector * lanes<T>, width,
        range.count(), [](Index, int) { return pset1<Packet<T>>(T(0)); },
        [&](Index c, int v, const Packet<T>& product) {
          T* o = softmax.value + c * width + (vector + v) * lanes<T>;
          pstoreu(o, pmadd(ploadu<Packet<T>>(o), factor[v], product));
        });
  }

  Index dim_;
  Index value_dim_;
  Index first_ = 0;
  Index count_ = 0;
  T* query_;
  T* state_;
  T* scores_;
  Lookahead lookahead_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
