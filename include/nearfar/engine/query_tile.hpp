#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/engine/key_tile.hpp>
#include <nearfar/engine/lane_mask.hpp>
#include <nearfar/engine/microkernel.hpp>
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
template <class T, int Vectors>
class QueryTile {
 public:
  using Panel = OnlineSoftmax<T, Vectors>;
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

  /// Attends to all keys of the tile.
  void visit(const KeyTile<T>& keys) {
    for (Index p = 0; p < panels(); ++p) {
      attend(p, keys, {0, keys.count()}, [&](Packet<T>(&max)[Vectors]) {
        score(p, keys, {0, keys.count()}, AllSeen{}, max);
      });
    }
  }

  /// Attends to the keys of the tile that the band, or whatever else answers as Band does, lets each query see. Only
  /// where the band's edges cross a panel are its queries told apart.
  template <class Band>
  void visit(const KeyTile<T>& keys, const Band& band) {
    for (Index p = 0; p < panels(); ++p) {
      const Index query = first_ + p * width;
      Range any = keys.within(band.seen_by_any(query, in_panel(p)));
      if (any.count() == 0) continue;
      // Ends that fall between register tiles move outward, to keys that the mask hides, or inward.
      constexpr Index step = tile_rows<Vectors>;
      any = {any.first / 4 * 4, std::min(round_up(any.end, 4), keys.count())};
      Range all = keys.within(band.seen_by_all(query, in_panel(p)));
      all = {std::min(round_up(all.first, step), any.end), all.end == keys.count() ? all.end : all.end / step * step};
      if (all.count() == 0) all = {any.end, any.end};
      const LaneMask<T, Band> hide{band, keys, query};
      attend(p, keys, any, [&](Packet<T>(&max)[Vectors]) {
        score(p, keys, {any.first, all.first}, hide, max);
        score(p, keys, all, AllSeen{}, max);
        score(p, keys, {all.end, any.end}, hide, max);
      });
    }
  }

  /// Starts each query where attention to other keys, already finished, has left it: query i where row i / children of
  /// `out` stands with its log-sum-exp.
  void start_from(const T* out, Index stride, const T* log_sum_exp, Index children) {
    for (Index p = 0; p < panels(); ++p) {
      const Panel softmax = panel(p);
      const Index first = first_ + p * width;
      const Index last = first + in_panel(p) - 1;
      for (Index lane = 0; lane < width; ++lane) {
        const Index parent = std::min(first + lane, last) / children;
        const bool empty = log_sum_exp[parent] == -infinity<T>;
        softmax.max[lane] = empty ? -infinity<T> : log2_e<T> * log_sum_exp[parent];
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
  void finish(Storage* out, Index stride, Storage* log_sum_exp, const T* factor = nullptr) {
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

  // The scores of a panel against keys [range.first, range.end), kept at scores_ from row range.first on, and their
  // maxima; mask(j, v, score) may hide some.
  template <class Mask>
  void score(Index p, const KeyTile<T>& keys, Range range, Mask&& mask, Packet<T> (&max)[Vectors]) {
    if (range.count() == 0) return;
    Packet<T> largest[Vectors];
    NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) largest[v] = max[v];
    multiply<Vectors>(
        keys.key(range.first), range.count(), query(p), width, dim_,
        [&](Index j, int) {
          lookahead_.step();
          return pset1<Packet<T>>(keys.bias(range.first + j));
        },
        [&](Index j, int v, const Packet<T>& product) {
          const Packet<T> masked = mask(range.first + j, v, product);
          largest[v] = pmax(largest[v], masked);
          pstoreu(scores_ + (range.first + j) * width + v * lanes<T>, masked);
        });
    NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) max[v] = largest[v];
  }

  // Takes keys [range.first, range.end) into the softmax of a panel: score_all(max) leaves their scores and maxima.
  template <class ScoreAll>
  void attend(Index p, const KeyTile<T>& keys, Range range, ScoreAll&& score_all) {
    Packet<T> max[Vectors];
    NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) max[v] = pset1<Packet<T>>(-infinity<T>);
    score_all(max);
    Panel softmax = panel(p);
    Packet<T> correction[Vectors];
    T* scores = scores_ + range.first * width;
    softmax.update(scores, range.count(), max, correction);
    multiply<Vectors>(
        keys.value_transposed(range.first), value_dim_, scores, width, range.count(),
        [](Index, int) { return pset1<Packet<T>>(T(0)); },
        [&](Index c, int v, const Packet<T>& product) {
          T* o = softmax.value + c * width + v * lanes<T>;
          pstoreu(o, pmadd(ploadu<Packet<T>>(o), correction[v], product));
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
