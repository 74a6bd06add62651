#pragma once

#include <nearfar/context.hpp>
#include <nearfar/detail/tiles.hpp>
#include <nearfar/mask.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>
#include <cmath>

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
      : heads_(heads), window_(window), scale_(scale), inputs_(inputs), factors_(factors) {
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
  // Rows lie apart by more than the hardware follows from page to page, so each is asked for some rows before its turn.
  static constexpr Index rows_ahead = 8;

  Range seen(const Sequence& rows) const {
    if (rows.query_count == 0) return {};
    return Band(window_, rows.query_count, rows.key_count).seen_by_any(0, rows.query_count);
  }

  // A triple: the value, then the maximum and the sum, in units of log 2 as in OnlineSoftmax.
  Index triple_size() const { return heads_.value_width() + 2; }
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
    T* weights = scratch.take<T>(lists * segment_keys);
    T* query = scratch.take<T>(rows.query_count * heads_.query_cols());
    for (Index i = 0; i < rows.query_count; ++i) {
      const Scalar* from = inputs_.query.row(rows.query_begin + i);
      T* to = query + i * heads_.query_cols();
      for (Index c = 0; c < heads_.query_cols(); ++c) to[c] = T(scale_) * log2_e<T> * T(from[c]);
    }

    for (Index list = 0; list < lists; ++list) std::fill_n(weights + list * segment_keys, filled, -infinity<T>);
    for (Index j = 0; j < count; ++j) {
      if (hidden(j)) continue;
      const Scalar* key = inputs_.key.row(rows.key_begin + first + j);
      for (Index i = 0; i < rows.query_count; ++i) {
        if (first + j < band.first(i) || first + j >= band.end(i)) continue;
        T* const scores = weights + i * heads_.query * segment_keys + j;
        const T* const own = query + i * heads_.query_cols();
        for_each_head([&, dim = heads_.dim, ahead = rows_ahead * inputs_.key.stride()](Index h, Index g) {
          scores[h * segment_keys] = dot(own + h * dim, key + g * dim, dim, ahead);
        });
      }
    }
    for (Index list = 0; list < lists; ++list) {
      T* triple = triples + list * triple_size();
      std::fill_n(triple, heads_.value_width(), T(0));
      weigh(weights + list * segment_keys, filled, triple[heads_.value_width()], triple[heads_.value_width() + 1]);
    }
    for (Index j = 0; j < count; ++j) {
      if (hidden(j)) continue;
      const Scalar* value = inputs_.value.row(rows.key_begin + first + j);
      for (Index i = 0; i < rows.query_count; ++i) {
        if (first + j < band.first(i) || first + j >= band.end(i)) continue;
        const T* const weight = weights + i * heads_.query * segment_keys + j;
        T* const triple = triples + i * heads_.query * triple_size();
        for_each_head([&, width = heads_.value_width(), size = triple_size(),
                       ahead = rows_ahead * inputs_.value.stride()](Index h, Index g) {
          // Of a key that weighs nothing an infinity would add NaN.
          const T own_weight = weight[h * segment_keys];
          if (own_weight != T(0)) add(own_weight, value + g * width, triple + h * size, width, ahead);
        });
      }
    }
  }

  // Calls visit(head, key_head) for all heads.
  template <class Visit>
  NEARFAR_INLINE void for_each_head(Visit&& visit) const {
    const Index group = heads_.group();
    for (Index g = 0, h = 0; h < heads_.query; ++g) {
      for (const Index end = h + group; h < end; ++h) visit(h, g);
    }
  }

  // What stands `ahead` numbers further on will be read soon.
  NEARFAR_INLINE static T dot(const T* query, const Scalar* key, Index dim, Index ahead) {
    T sum = 0;
    Index c = 0;
    if constexpr (std::is_same_v<T, Scalar>) {
      Packet<T> sums = pset1<Packet<T>>(T(0));
      for (; c + lanes<T> <= dim; c += lanes<T>) {
        prefetch_far(key + c + ahead);
        sums = pmadd(ploadu<Packet<T>>(query + c), ploadu<Packet<T>>(key + c), sums);
      }
      sum = predux(sums);
    }
    for (; c < dim; ++c) sum += query[c] * T(key[c]);
    return sum;
  }

  // value += weight * row
  NEARFAR_INLINE static void add(T weight, const Scalar* row, T* value, Index width, Index ahead) {
    Index c = 0;
    if constexpr (std::is_same_v<T, Scalar>) {
      const Packet<T> factor = pset1<Packet<T>>(weight);
      for (; c + lanes<T> <= width; c += lanes<T>) {
        prefetch_far(row + c + ahead);
        pstoreu(value + c, pmadd(factor, ploadu<Packet<T>>(row + c), ploadu<Packet<T>>(value + c)));
      }
    }
    for (; c < width; ++c) value[c] += weight * T(row[c]);
  }

  // Turns a list of `count` scores, whole vectors, into weights 2^(score - max) and gives their maximum and sum.
  static void weigh(T* scores, Index count, T& max, T& sum) {
    static_assert(segment_keys % lanes<T> == 0);
    Packet<T> largest = ploadu<Packet<T>>(scores);
    for (Index j = lanes<T>; j < count; j += lanes<T>) largest = pmax(largest, ploadu<Packet<T>>(scores + j));
    max = predux_max(largest);
    const Packet<T> shift = pset1<Packet<T>>(max == -infinity<T> ? T(0) : max);
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
        const auto triple = [&](Index s) {
          return triples + s * triples_size() + (i * heads_.query + h) * triple_size();
        };
        for (Index k = 1; k < segments; ++k) {
          merge_triples(triple(0)[width], triple(0)[width + 1], triple(0), triple(k)[width], triple(k)[width + 1],
                        triple(k), width);
        }
        const T sum = segments > 0 ? triple(0)[width + 1] : T(0);
        Scalar* row = out.row(rows.query_begin + i) + h * width;
        for (Index c = 0; c < width; ++c) {
          const T factor = factors_.rows() == 0 ? T(1) : factors_(h, c);
          row[c] = sum == T(0) ? Scalar(0) : Scalar(factor * (triple(0)[c] / sum));
        }
        if (log_sum_exp != nullptr) {
          const T max = segments > 0 ? triple(0)[width] : -infinity<T>;
          log_sum_exp[h * inputs_.query.rows() + rows.query_begin + i] = natural_log_sum_exp(max, sum);
        }
      }
    }
  }

  const Heads& heads_;
  Window window_;
  double scale_;
  const Inputs<Scalar>& inputs_;
  Tokens<const T> factors_;
  Index queries_ = 0;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
