#pragma once

#include <nearfar/detail/function_ref.hpp>
#include <nearfar/detail/lookahead.hpp>
#include <nearfar/detail/stores.hpp>
#include <nearfar/detail/transpose.hpp>
#include <nearfar/engine/microkernel.hpp>
#include <nearfar/engine/softmax/key_tile.hpp>
#include <nearfar/engine/softmax/lane_mask.hpp>
#include <nearfar/engine/softmax/panel_keys.hpp>
#include <nearfar/engine/softmax/panels.hpp>
#include <nearfar/mask.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>
#include <cmath>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// A tile of queries that walks over key tiles, holding the online softmax of what it has seen.
///
/// Queries lie on the vector lanes, in panels of `width`, the vectors of which share the numbers that the microkernel
/// broadcasts: scores are S^T = K Q^T and values O^T = V^T P^T, so that K
/// and V are read number by number as they stand, row maxima and sums need no work across lanes, and only Q is
/// transposed on the way in and O on the way out. A panel's scores over one key tile stay in the first-level cache.
template <class T>
class QueryTile {
 public:
  using Panel = OnlineSoftmax<T, panel_vectors>;
  static constexpr Index width = Panel::width;

  /// Of `count` queries of `dim` features, the first of them number `first` of its sequence, against values of
  /// `value_dim`. The queries of a `block` see the same keys, or most of them.
  NEARFAR_NO_INLINE QueryTile(Scratch& scratch, Index first, Index count, Index dim, Index value_dim,
                              Index block = Window::unlimited)
      : dim_(dim),
        value_dim_(value_dim),
        first_(first),
        panels_(scratch, first, count, block),
        query_(scratch.take<T>(panels_.count() * width * dim)),
        state_(scratch.take<T>(panels_.count() * width * state_rows())),
        scores_(scratch.take<T>(KeyTile<T>::capacity * width)),
        sums_(scratch.take<T>(value_rows() * width)) {}

  /// Takes the queries of the tile, which begins at `rows`, times `factor`.
  void load(const T* rows, Index stride, T factor) { load_until(panels_.queries(), rows, stride, factor); }

  /// The same, panel by panel, of at least the first `end` queries: those that a walk over the keys has not come to
  /// need no cache yet.
  void load_until(Index end, const T* rows, Index stride, T factor) {
    for (; loaded() < end; ++loaded_) {
      const Index p = loaded_;
      const Index count = panels_.size(p);
      if (count % lanes<T> != 0) std::fill_n(query(p), width * dim_, T(0));
      transpose(rows + panels_.begin(p) * stride, stride, count, dim_, factor, query(p), width);
      panel(p).start();
      T* const unused = panel(p).value + value_dim_ * width;
      std::fill(unused, panel(p).max + state_rows() * width, T(0));
    }
  }

  /// The queries that are loaded and not finished attend to the keys of the tile that the band lets each of them see.
  /// Keys that some vectors of a panel alone can see do not meet the others.
  template <Visibility B>
  NEARFAR_NO_INLINE void visit(KeyTile<T>& keys, const B& band) {
    keys.complete();
    const bool finite = keys.values_are_finite();
    for (Index p = finished_; p < loaded_; ++p) {
      const Index first = first_ + panels_.begin(p);
      Packet<T> max[panel_vectors];
      std::fill_n(max, panel_vectors, pset1<Packet<T>>(-infinity<T>));
      const auto hide_edges = [&](int vector, int vectors, Range range, Range all) {
        for (int v = vector; v < vector + vectors; ++v) {
          hide(LaneMask<T, B>{band, keys, first + v * lanes<T>}, range, all, scores_ + v * lanes<T>, width,
               [&](const Packet<T>& masked) { max[v] = pmax(max[v], masked); });
        }
      };
      meet(p, keys, PanelKeys(keys, band, first, panels_.size(p)), finite, max, hide_edges);
    }
  }

  /// Starts each query where attention to other keys, already finished, has left it: query i where row i / children of
  /// `out` stands with its log-sum-exp.
  void start_from(const T* out, Index stride, const double* log_sum_exp, Index children) {
    for (Index p = 0; p < panels_.count(); ++p) {
      const Panel softmax = panel(p);
      const Index first = first_ + panels_.begin(p);
      const Index last = first + panels_.size(p) - 1;
      for (Index lane = 0; lane < width; ++lane) {
        const Shift<T> shift(log_sum_exp[std::min(first + lane, last) / children]);
        softmax.max[lane] = shift.sees() ? shift.nearest : -infinity<T>;
        softmax.sum[lane] = shift.sees() ? std::exp2(shift.rest) : T(0);
      }
      for (Index lane = 0; lane < width; lane += lanes<T>) {
        const T* row = out + std::min(first + lane, last) / children * stride;
        T* value = softmax.value + lane;
        const Packet<T> sum = ploadu<Packet<T>>(softmax.sum + lane);
        if (row == out + std::min(first + lane + lanes<T> - 1, last) / children * stride) {
          for (Index c = 0; c < value_dim_; ++c) pstoreu(value + c * width, pmul(sum, pset1<Packet<T>>(row[c])));
          continue;
        }
        for (Index i = 0; i < lanes<T>; ++i) {
          row = out + std::min(first + lane + i, last) / children * stride;
          for (Index c = 0; c < value_dim_; ++c) value[c * width + i] = softmax.sum[lane + i] * row[c];
        }
      }
    }
  }

  /// Writes the result of each query to its row of out, times a factor a feature unless that is null, and its
  /// log-sum-exp beside where that is not null.
  void finish(T* out, Index stride, double* log_sum_exp, const T* factor = nullptr, KeepOrPastCaches store = {}) {
    finish_until(panels_.queries(), out, stride, log_sum_exp, factor, store);
  }

  /// The same of the panels that hold none but the first `end` queries: they meet no further keys.
  void finish_until(Index end, T* out, Index stride, double* log_sum_exp, const T* factor, KeepOrPastCaches store) {
    for (; finished_ < panels_.count() && panels_.begin(finished_ + 1) <= end; ++finished_) {
      const Index first = panels_.begin(finished_);
      panel(finished_).finish(panels_.size(finished_), out + first * stride, stride,
                              log_sum_exp == nullptr ? nullptr : log_sum_exp + first, factor, store);
    }
  }

  /// What the next visit will read, fetched during this one.
  Lookahead& lookahead() { return lookahead_; }

  /// How many queries are loaded, and how many of these finished.
  Index loaded() const { return panels_.begin(loaded_); }
  Index finished() const { return panels_.begin(finished_); }

 private:
  // The maximum, the sum and the value, whose features come in whole groups.
  Index state_rows() const { return 2 + value_rows(); }
  Index value_rows() const { return round_up(value_dim_, group_rows); }

  T* query(Index p) const { return query_ + p * width * dim_; }

  Panel panel(Index p) const {
    T* state = state_ + p * width * state_rows();
    return {state, state + width, state + 2 * width, value_dim_};
  }

  // Attends to the keys that a panel meets; hide(vector, vectors, keys, all) hides those that not all of its queries
  // see. `finite` says whether the values are; `max`, of each vector, begins at -infinity.
  void meet(Index p, const KeyTile<T>& keys, const PanelKeys& seen, bool finite, Packet<T>* max,
            FunctionRef<void(int, int, Range, Range)> hide) {
    seen.for_each_stretch([&](auto vectors, int vector, Range range, Range all) {
      for (const Range& part : {Range{range.first, all.first}, all, Range{all.end, range.end}}) {
        score<vectors>(p, vector, keys, part, part.first == all.first ? max : nullptr);
      }
      hide(vector, vectors, range, all);
    });
    Panel softmax = panel(p);
    Packet<T> factor[panel_vectors];
    for (int v = 0; v < panel_vectors; ++v) {
      const Range any = seen.any(v);
      if (any.count() > 0) factor[v] = softmax.update(v, scores_ + any.first * width, any.count(), max[v]);
    }
    if (finite) {
      return seen.for_each_stretch([&](auto vectors, int vector, Range range, Range) {
        add_values<vectors>(softmax, vector, keys, range, seen, factor);
      });
    }
    for (int v = 0; v < panel_vectors; ++v) {
      if (seen.any(v).count() > 0) add_weighed_values(softmax, v, keys, seen.any(v), factor[v]);
    }
  }

  // The scores of Vectors vectors of a panel, from `vector` on, against some keys, kept at scores_ a row a key; and
  // their maxima, where these are asked for.
  template <int Vectors>
  void score(Index p, Index vector, const KeyTile<T>& keys, Range range, Packet<T>* max = nullptr) {
    T* scores = scores_ + vector * lanes<T>;
    for (Index first = range.first; first < range.end; first += group_rows) {
      // Of one group alone: kept in registers from group to group, the maxima drive g++ to spill the product's vectors.
      Packet<T> largest[Vectors];
      NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) largest[v] = pset1<Packet<T>>(-infinity<T>);
      multiply_tile<group_rows, Vectors>(
          keys.key(0), first, query(p) + vector * lanes<T>, width, dim_,
          [&](Index j, int) { return pset1<Packet<T>>(keys.bias(j)); },
          [&](Index j, int v, const Packet<T>& product) {
            largest[v] = pmax(largest[v], product);
            pstoreu(scores + j * width + v * lanes<T>, product);
          },
          Pace{lookahead_, fetch_pace});
      if (max == nullptr) continue;
      NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) max[vector + v] = pmax(max[vector + v], largest[v]);
    }
  }

  // value = factor * value + what its keys add, for Vectors vectors of a panel from `vector` on. What a visit adds to a
  // value is one sum in the order of the keys, into however many stretches these fall, else keys that a query does not
  // see would change its last bit: from the first stretch of a vector to its last it waits in sums_.
  template <int Vectors>
  void add_values(const Panel& softmax, Index vector, const KeyTile<T>& keys, Range range, const PanelKeys& seen,
                  const Packet<T>* factor) {
    bool begins[Vectors], ends[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      begins[v] = seen.any(static_cast<int>(vector) + v).first == range.first;
      ends[v] = seen.any(static_cast<int>(vector) + v).end == range.end;
    }
    const auto at = [&](Index c, int v) { return c * width + (vector + v) * lanes<T>; };
    multiply_groups<group_rows, Vectors>(
        keys.value_transposed(range.first), keys.value_stride(), scores_ + range.first * width + vector * lanes<T>,
        width, range.count(),
        [&](Index c, int v) { return begins[v] ? pset1<Packet<T>>(T(0)) : ploadu<Packet<T>>(sums_ + at(c, v)); },
        [&](Index c, int v, const Packet<T>& product) {
          if (!ends[v]) return pstoreu(sums_ + at(c, v), product);
          T* const o = softmax.value + at(c, v);
          pstoreu(o, pmadd(ploadu<Packet<T>>(o), factor[vector + v], product));
        },
        Pace{lookahead_, fetch_pace});
  }

  // The same for one vector where infinity or NaN stands among the values. A weight of zero, as every key has that a
  // query does not see, adds nothing, where a product would add NaN.
  NEARFAR_NO_INLINE void add_weighed_values(const Panel& softmax, Index vector, const KeyTile<T>& keys, Range range,
                                            const Packet<T>& factor) {
    for (Index c = 0; c < value_dim_; ++c) {
      Packet<T> sum = pset1<Packet<T>>(T(0));
      for (Index j = range.first; j < range.end; ++j) {
        const Packet<T> weight = ploadu<Packet<T>>(scores_ + j * width + vector * lanes<T>);
        const Packet<T> none = pcmp_eq(weight, pset1<Packet<T>>(T(0)));
        sum = pselect(none, sum, Packet<T>(pmadd(weight, pset1<Packet<T>>(keys.value(j).data[c]), sum)));
      }
      T* const o = softmax.value + c * width + vector * lanes<T>;
      pstoreu(o, pmadd(ploadu<Packet<T>>(o), factor, sum));
    }
  }

  Index dim_;
  Index value_dim_;
  Index first_;
  Panels<T> panels_;
  Index loaded_ = 0;    // panels
  Index finished_ = 0;  // of these
  T* query_;
  T* state_;
  T* scores_;
  T* sums_;
  Lookahead lookahead_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
