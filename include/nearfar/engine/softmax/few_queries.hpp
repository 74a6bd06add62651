#pragma once

#include <nearfar/context.hpp>
#include <nearfar/engine/tiles.hpp>
#include <nearfar/mask.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Softmax attention of a few queries over many keys: one step of decoding.
///
/// With so little arithmetic for each key the keys and values are read just once and in the order in which they lie,
/// all heads of a row together, first the keys for the scores, then the values. Keys are cut into segments of fixed
/// length, the tasks that threads share; the triples (max, sum, value) that the segments leave are merged in order.
template <class Scalar>
class FewQueries {
 public:
  using T = Accumulator<Scalar>;

  /// Beyond so many queries in a sequence, a tile with queries on the vector lanes does the same work in less time.
  static constexpr Index most = 6;

  /// Where `factors` (heads.query x value_dim) has rows, the features of out are multiplied by it.
  FewQueries(const Heads& heads, Window window, double scale, const Inputs<Scalar>& inputs, Tokens<const T> factors)
      : heads_(heads), window_(window), scale_(log2_scale<T>(scale)), inputs_(inputs), factors_(factors) {
    for (Index b = 0; b < sequence_count(inputs); ++b) queries_ = std::max(queries_, sequence(inputs, b).query_count);
  }

  /// Whether the inputs are of this kind.
  bool suits() const { return queries_ <= most; }

  void attend(Work& work, Tokens<Scalar> out, double* log_sum_exp) const {
    const Index sequences = sequence_count(inputs_);
    const Tiles segments(
        work, sequences, [&](Index b) { return seen(sequence(inputs_, b)).count(); },
        [](Index) { return segment_keys; });
    T* triples = work.take<T>(segments.count() * triples_size());
    work.for_each(segments.count(), [&](Index s, Scratch& scratch) {
      attend_segment(segments[s], triples + s * triples_size(), scratch);
    });
    work.for_each(sequences, [&](Index b, Scratch&) {
      const Range own = segments.of(b);
      merge(sequence(inputs_, b), own.count(), triples + own.first * triples_size(), out, log_sum_exp);
    });
  }

 private:
  static constexpr Index segment_keys = 1024;
  // A list of weights for each query and head: whole pages apart they would all crowd into one set of the cache.
  static constexpr Index list_room = segment_keys + cache_line / Index{sizeof(T)};
  // Rows lie apart by more than the hardware follows from page to page, so each is asked for some rows before its turn.
  static constexpr Index rows_ahead = 8;

  Range seen(const Sequence& rows) const {
    if (rows.query_count == 0) return {};
    return Band(window_, rows.query_count, rows.key_count).seen_by_any(0, rows.query_count);
  }

  // A triple as in OnlineSoftmax: the value and, behind it, the maximum and the sum. Each begins at a cache line.
  struct Triple {
    T* value;
    T& max;
    T& sum;
  };
  Triple triple(T* at) const { return {at, at[heads_.value_width()], at[heads_.value_width() + 1]}; }
  Index triple_size() const { return round_up(heads_.value_width() + 2, cache_line / Index{sizeof(T)}); }
  Index triples_size() const { return queries_ * heads_.query * triple_size(); }

  void attend_segment(const Tile& segment, T* triples, Scratch& scratch) const {
    const Sequence rows = sequence(inputs_, segment.sequence);
    const Band band(window_, rows.query_count, rows.key_count);
    const std::uint8_t* mask = key_mask(inputs_, rows);
    const Index first = seen(rows).first + segment.first;
    const Index count = segment.count;
    const Index filled = round_up(count, lanes<T>);
    const auto hidden = [&](Index j) { return mask != nullptr && mask[first + j] == 0; };
    const Index lists = rows.query_count * heads_.query;
    T* weights = scratch.take<T>(lists * list_room);
    T* query = scratch.take<T>(rows.query_count * heads_.query_cols());
    for (Index i = 0; i < rows.query_count; ++i) {
      const Scalar* from = inputs_.query.row(rows.query_begin + i);
      T* to = query + i * heads_.query_cols();
      for (Index c = 0; c < heads_.query_cols(); ++c) to[c] = scale_ * T(from[c]);
    }

    for (Index list = 0; list < lists; ++list) std::fill_n(weights + list * list_room, filled, -infinity<T>);
    const auto for_each_pair = [&](auto&& visit) {
      for (Index j = 0; j < count; ++j) {
        if (hidden(j)) continue;
        for (Index i = 0; i < rows.query_count; ++i) {
          if (first + j < band.first(i) || first + j >= band.end(i)) continue;
          visit(rows.key_begin + first + j, i, weights + i * heads_.query * list_room + j);
        }
      }
    };
    const auto score = by_vectors(
        heads_.dim, [](auto vectors, auto together) { return &FewQueries::template score<vectors, together>; });
    for_each_pair([&](Index key, Index i, T* scores) {
      (this->*score)(query + i * heads_.query_cols(), inputs_.key.row(key), scores);
    });
    for (Index list = 0; list < lists; ++list) {
      const Triple own = triple(triples + list * triple_size());
      std::fill_n(own.value, heads_.value_width(), T(0));
      weigh(weights + list * list_room, filled, own.max, own.sum);
    }
    const auto add = by_vectors(heads_.value_width(), [](auto vectors, auto together) {
      return &FewQueries::template add_values<vectors, together>;
    });
    for_each_pair([&](Index key, Index i, const T* weight) {
      (this->*add)(weight, inputs_.value.row(key), triples + i * heads_.query * triple_size());
    });
  }

  // What choose gives for how many vectors of a head to take at a time, an integral constant: four if these leave
  // nothing over, else one, and then number by number. (Blocks of four with what is left over behind them, in one loop
  // for all widths, take a quarter longer while keys and values are in a cache.) And for how many of the heads that
  // share a key: it is read once for four.
  template <class Choose>
  auto by_vectors(Index features, Choose&& choose) const {
    constexpr int together = std::min(4, lanes<T>);
    const std::integral_constant<int, 1> one;
    if (features % (4 * lanes<T>) != 0) return choose(one, one);
    const std::integral_constant<int, 4> four;
    return heads_.group() % together == 0 ? choose(four, std::integral_constant<int, together>{}) : choose(four, one);
  }

  // scores[h * list_room] = query_h . key_h for all heads.
  template <int vectors, int together>
  NEARFAR_NO_INLINE void score(const T* query, const Scalar* key, T* scores) const {
    const Index dim = heads_.dim, group = heads_.group();
    const Ahead ahead(inputs_.key);
    ahead.fetch_row(key);
    for (const Scalar* const end = key + heads_.key_cols(); key < end; key += dim) {
      ahead.fetch_head(key, dim);
      for (Index h = group; h > 0; h -= together, query += together * dim, scores += together * list_room) {
        dot<vectors, together>(query, key, dim, scores);
      }
    }
  }

  // values_h += weight_h value_h for all heads.
  template <int vectors, int together>
  NEARFAR_NO_INLINE void add_values(const T* weight, const Scalar* value, T* triples) const {
    const Index width = heads_.value_width(), group = heads_.group(), size = triple_size();
    const Ahead ahead(inputs_.value);
    ahead.fetch_row(value);
    for (const Scalar* const end = value + heads_.value_cols(); value < end; value += width) {
      ahead.fetch_head(value, width);
      for (Index h = group; h > 0; h -= together, weight += together * list_room, triples += together * size) {
        add<vectors, together>(weight, value, triples, size, width);
      }
    }
  }

  // Fetches what will be read some rows later. Where rows lie end to end the hardware follows them, and to be asked for
  // every line would hold it up: it is shown where each begins.
  struct Ahead {
    explicit Ahead(Tokens<const Scalar> rows)
        : distance(rows_ahead * rows.stride() * Index{sizeof(Scalar)}), end_to_end(rows.stride() == rows.cols()) {}

    NEARFAR_INLINE void fetch_row(const Scalar* row) const {
      if (end_to_end) prefetch_far(row, distance);
    }
    NEARFAR_INLINE void fetch_head(const Scalar* features, Index count) const {
      if (end_to_end) return;
      for (Index at = 0; at < count * Index{sizeof(Scalar)}; at += cache_line) prefetch_far(features, at + distance);
    }

    Index distance;  // in bytes
    bool end_to_end;
  };

  // scores[h * list_room] = query_h . key for heads that share the key.
  template <int vectors, int together>
  NEARFAR_INLINE static void dot(const T* query, const Scalar* key, Index dim, T* scores) {
    Packet<T> sums[together];
    NEARFAR_UNROLL for (int h = 0; h < together; ++h) sums[h] = pset1<Packet<T>>(T(0));
    const Index rest = for_each_block<vectors>(dim, [&](Index c) {
      const Packet<T> features = ploadu<Packet<T>>(key + c);
      NEARFAR_UNROLL for (int h = 0; h < together; ++h) {
        sums[h] = pmadd(ploadu<Packet<T>>(query + h * dim + c), features, sums[h]);
      }
    });
    T products[together];
    sum_vectors(sums, products);
    NEARFAR_UNROLL for (int h = 0; h < together; ++h) {
      for (Index c = rest; c < dim; ++c) products[h] += query[h * dim + c] * T(key[c]);
      scores[h * list_room] = products[h];
    }
  }

  // value_h += weight_h * row for heads that share the row; their values lie `size` apart.
  template <int vectors, int together>
  NEARFAR_INLINE static void add(const T* weight, const Scalar* row, T* value, Index size, Index width) {
    const auto weighs_nothing = [weight](int h) { return weight[h * list_room] == T(0); };
    bool all_weigh = true;
    NEARFAR_UNROLL for (int h = 0; h < together; ++h) all_weigh = all_weigh && !weighs_nothing(h);
    if (!all_weigh) {
      // Of a key that weighs nothing an infinity would add NaN.
      for (int h = 0; h < together; ++h) {
        for (Index c = 0; c < width && !weighs_nothing(h); ++c) {
          value[h * size + c] += weight[h * list_room] * T(row[c]);
        }
      }
      return;
    }
    Packet<T> factor[together];
    NEARFAR_UNROLL for (int h = 0; h < together; ++h) factor[h] = pset1<Packet<T>>(weight[h * list_room]);
    const Index rest = for_each_block<vectors>(width, [&](Index c) {
      const Packet<T> features = ploadu<Packet<T>>(row + c);
      NEARFAR_UNROLL for (int h = 0; h < together; ++h) {
        T* const to = value + h * size + c;
        pstoreu(to, pmadd(factor[h], features, ploadu<Packet<T>>(to)));
      }
    });
    for (Index c = rest; c < width; ++c) {
      for (int h = 0; h < together; ++h) value[h * size + c] += weight[h * list_room] * T(row[c]);
    }
  }

  // Calls visit(first) for the vectors of a row, `vectors` at a time; gives the first number that none of them has.
  template <int vectors, class Visit>
  NEARFAR_INLINE static Index for_each_block(Index count, Visit&& visit) {
    Index c = 0;
    if constexpr (std::is_same_v<T, Scalar>) {
      for (; vectors == 1 ? c + lanes<T> <= count : c < count; c += vectors * lanes<T>) {
        NEARFAR_UNROLL for (int v = 0; v < vectors; ++v) visit(c + v * lanes<T>);
      }
    }
    return c;
  }

  // Turns a list of `count` scores, whole vectors, into weights 2^(score - max) and gives their maximum and sum.
  static void weigh(T* scores, Index count, T& max, T& sum) {
    static_assert(segment_keys % lanes<T> == 0);
    Packet<T> largest = ploadu<Packet<T>>(scores);
    for (Index j = lanes<T>; j < count; j += lanes<T>) largest = pmax(largest, ploadu<Packet<T>>(scores + j));
    max = predux_max(largest);
    const Packet<T> shift = shift_of(pset1<Packet<T>>(max));
    Packet<T> sums = pset1<Packet<T>>(T(0));
    for (Index j = 0; j < count; j += lanes<T>) {
      const Packet<T> weight = exp2<T>(psub(ploadu<Packet<T>>(scores + j), shift));
      pstoreu(scores + j, weight);
      sums = padd(sums, weight);
    }
    sum = predux(sums);
  }

  void merge(const Sequence& rows, Index segments, T* triples, Tokens<Scalar> out, double* log_sum_exp) const {
    const Index width = heads_.value_width();
    for (Index i = 0; i < rows.query_count; ++i) {
      for (Index h = 0; h < heads_.query; ++h) {
        const auto of_segment = [&](Index s) {
          return triple(triples + s * triples_size() + (i * heads_.query + h) * triple_size());
        };
        Scalar* const row = out.row(rows.query_begin + i) + h * width;
        double* const saved =
            log_sum_exp == nullptr ? nullptr : log_sum_exp + h * inputs_.query.rows() + rows.query_begin + i;
        if (segments == 0) {
          std::fill_n(row, width, Scalar(0));
          if (saved != nullptr) *saved = -infinity<double>;
          continue;
        }
        const Triple all = of_segment(0);
        for (Index s = 1; s < segments; ++s) {
          const Triple next = of_segment(s);
          merge_triples(all.max, all.sum, all.value, next.max, next.sum, next.value, width);
        }
        for (Index c = 0; c < width; ++c) {
          const T factor = factors_.rows() == 0 ? T(1) : factors_(h, c);
          row[c] = all.sum == T(0) ? Scalar(0) : Scalar(factor * (all.value[c] / all.sum));
        }
        if (saved != nullptr) *saved = natural_log_sum_exp(all.max, all.sum);
      }
    }
  }

  const Heads& heads_;
  Window window_;
  T scale_;
  const Inputs<Scalar>& inputs_;
  Tokens<const T> factors_;
  Index queries_ = 0;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
