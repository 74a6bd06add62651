#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/detail/stores.hpp>
#include <nearfar/engine/microkernel.hpp>
#include <nearfar/engine/softmax/row_products.hpp>
#include <nearfar/engine/tiles.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Softmax attention through a window of few keys.
///
/// A panel of queries on the vector lanes visits what any of its queries sees: with a window no wider than the panel
/// most of that is masked away. Here four queries at a time meet their keys, features on the lanes: scores as products
/// of rows, summed across lanes many at a time, all kept as [key][query]; then their softmax, in one pass, since
/// they all fit; then values by the register microkernel.
///
/// There is so little work for each row that memory decides: while a tile is at work, the rows of the next are fetched,
/// whole and in the order in which they lie. So the keys of a head are near when they are copied side by side, and the
/// copies of one head alone are what the first cache has to hold.
template <class Scalar>
class NarrowWindow {
 public:
  using T = Accumulator<Scalar>;

  /// Where `factors` (heads.query x value_dim) has rows, the features of out are multiplied by it.
  NarrowWindow(const Heads& heads, Window window, double scale, const Inputs<Scalar>& inputs, Tokens<const T> factors)
      : heads_(heads),
        window_(window),
        scale_(log2_scale<T>(scale)),
        inputs_(inputs),
        factors_(factors),
        key_width_(round_up(heads.dim, lanes<T>)),
        value_width_(round_up(heads.value_width(), lanes<T>)) {}

  /// Whether the window is narrow enough for the heads.
  bool suits() const { return std::is_same_v<Scalar, T> && meets_by_rows<T>(heads_, window_); }

  void attend(Work& work, Tokens<Scalar> out, double* log_sum_exp) const {
    const Tiles tiles(work, inputs_, queries_a_tile);
    work.for_each(tiles.count(), [&](Index task, Scratch& scratch) {
      const Tile tile = tiles[task];
      const Sequence rows = sequence(inputs_, tile.sequence);
      Keys keys(key_width_, value_width_, scratch);
      find(rows, tile, keys);
      Bounds bounds[queries_a_tile / queries_at_once];
      for (Index i = 0; i < tile.count; i += queries_at_once) {
        bounds[i / queries_at_once] = bounds_of(rows, tile, i, keys);
      }
      Spread fetch = look_ahead(rows, tile, work.threads(), out);
      const Buffers buffers{scratch.take<T>(room), scratch.take<T>(queries_at_once * key_width_),
                            scratch.take<T>(queries_at_once * value_width_),
                            scratch.take<T>(heads_.query * value_width_)};
      fill_factors(buffers.factors);
      with_store(past_caches(out, heads_.value_width()), [&](KeepOrPastCaches store) {
        for (Index h = 0; h < heads_.query; ++h) {
          if (h % heads_.group() == 0) load(rows, h / heads_.group(), keys);
          for (Index i = 0; i < tile.count; i += queries_at_once) {
            const Queries queries{rows.query_begin + tile.first + i, std::min(queries_at_once, tile.count - i)};
            attend(queries, bounds[i / queries_at_once], keys, h, buffers, fetch, out, store, log_sum_exp);
          }
        }
      });
    });
  }

 private:
  static constexpr Index queries_a_tile = 64;
  // Scores of the keys that four queries see, filled up to as many as are weighed at once.
  static constexpr Index room = round_up(queries_at_once * (most_narrow_keys + 2 * queries_at_once), 4 * lanes<T>);

  struct Queries {
    Index first;
    Index count;
  };

  /// The keys of a tile and their values, of one head, rows filled up. Places are counted from the first key that the
  /// tile sees; that of each key stands four times, so that places compare with scores kept as [key][query].
  struct Keys {
    static constexpr Index capacity = queries_a_tile + most_narrow_keys;

    Keys(Index key_width, Index value_width, Scratch& scratch)
        : key(scratch.take<T>(capacity * key_width)),
          value(scratch.take<T>(capacity * value_width)),
          position(scratch.take<Index>(capacity)),
          place(scratch.take<T>(queries_at_once * (capacity + keys_at_once))) {}

    T* key;
    T* value;
    Index* position;
    T* place;
    Index origin = 0;
    Index count = 0;
    bool values_are_finite = true;  ///< else a weight of zero times a value may not be zero
  };

  /// What four queries of a head need beside: the scores of their keys, that become weights; where their rows, and
  /// those of out, are filled up; and what the features of out are multiplied by.
  struct Buffers {
    T* weights;
    T* query;
    T* out;
    T* factors;
  };

  /// Which of a tile's keys some of four queries see, and the places where each of them begins and ends to see.
  struct Bounds {
    Range keys;
    T from[lanes<T>];
    T end[lanes<T>];
  };

  // The keys that the tile sees.
  void find(const Sequence& rows, const Tile& tile, Keys& keys) const {
    const std::uint8_t* mask = key_mask(inputs_, rows);
    const Range seen = Band(window_, rows.query_count, rows.key_count).seen_by_any(tile.first, tile.count);
    keys.origin = seen.first;
    for (Index j = seen.first; j < seen.end; ++j) {
      if (mask != nullptr && mask[j] == 0) continue;
      std::fill_n(keys.place + keys.count * queries_at_once, queries_at_once, T(j - keys.origin));
      keys.position[keys.count++] = j;
    }
    // No query sees the places after the last key, which complete a group of keys_at_once.
    std::fill_n(keys.place + keys.count * queries_at_once, products_at_once, infinity<T>);
  }

  // Copies their rows of one head. By itself, as `score`: within the walk its pointers do not fit the registers.
  NEARFAR_NO_INLINE void load(const Sequence& rows, Index head, Keys& keys) const {
    const Index dim = heads_.dim, value_dim = heads_.value_width();
    Packet<T> zeros = pset1<Packet<T>>(T(0));
    for (Index j = 0; j < keys.count; ++j) {
      const Index row = rows.key_begin + keys.position[j];
      copy_filled(inputs_.key.row(row) + head * dim, dim, keys.key + j * key_width_);
      zeros =
          por(zeros, copy_filled(inputs_.value.row(row) + head * value_dim, value_dim, keys.value + j * value_width_));
    }
    keys.values_are_finite = all_finite(zeros);
  }

  void fill_factors(T* factors) const {
    std::fill_n(factors, heads_.query * value_width_, T(1));
    for (Index h = 0; h < factors_.rows(); ++h) {
      std::copy_n(factors_.row(h), heads_.value_width(), factors + h * value_width_);
    }
  }

  Bounds bounds_of(const Sequence& rows, const Tile& tile, Index first, const Keys& keys) const {
    const Band band(window_, rows.query_count, rows.key_count);
    const Range seen = band.seen_by_any(tile.first + first, std::min(queries_at_once, tile.count - first));
    const auto place_of = [&](Index position) {
      return static_cast<Index>(std::lower_bound(keys.position, keys.position + keys.count, position) - keys.position);
    };
    Bounds bounds;
    bounds.keys = {place_of(seen.first), place_of(seen.end)};
    for (Index lane = 0; lane < lanes<T>; ++lane) {
      const Index query = tile.first + first + lane % queries_at_once;
      bounds.from[lane] = T(band.first(query) - keys.origin);
      bounds.end[lane] = T(band.end(query) - keys.origin);
    }
    return bounds;
  }

  // Fetches what this thread's next tile likely reads that this one has not, while this one takes its scores.
  Spread look_ahead(const Sequence& rows, const Tile& tile, Index threads, Tokens<Scalar> out) const {
    const Band band(window_, rows.query_count, rows.key_count);
    const Index first = tile.first + threads * queries_a_tile;
    const Index next = std::min(queries_a_tile, rows.query_count - first);
    if (next <= 0) return Spread();
    Lookahead ahead;
    const Range keys{std::max(band.first(first), band.end(tile.first + tile.count - 1)), band.end(first + next - 1)};
    const auto add = [&](const auto& tokens, Index row, Index count) { ahead.add(tokens.middle_rows(row, count)); };
    add(inputs_.key, rows.key_begin + keys.first, keys.count());
    add(inputs_.value, rows.key_begin + keys.first, keys.count());
    add(inputs_.query, rows.query_begin + first, next);
    if (!past_caches(out, heads_.value_width())) add(out, rows.query_begin + first, next);
    const Index groups = (window_.left + window_.right + queries_at_once) / keys_at_once;
    return Spread(ahead, heads_.query * tile.count / queries_at_once * groups);
  }

  void attend(Queries queries, const Bounds& bounds, const Keys& keys, Index head, const Buffers& buffers,
              Spread& fetch, Tokens<Scalar> out, KeepOrPastCaches store, double* log_sum_exp) const {
    const Index first = bounds.keys.first, count = bounds.keys.count();
    // Where fewer than four queries are left the last one stands in for the others, and is written once.
    const auto row = [&](Index q) { return queries.first + std::min(q, queries.count - 1); };
    const T* query[queries_at_once];
    for (Index q = 0; q < queries_at_once; ++q) {
      query[q] = inputs_.query.row(row(q)) + head * heads_.dim;
      if (heads_.dim == key_width_) continue;
      copy_filled(query[q], heads_.dim, buffers.query + q * key_width_);
      query[q] = buffers.query + q * key_width_;
    }

    const Packet<T> max = score(query, bounds, keys, buffers.weights, fetch);
    const Packet<T> sum = weigh(buffers.weights, count, max);

    constexpr Index several = std::max<Index>(lanes<T>, queries_at_once);
    T maxima[several], sums[several];
    pstoreu(maxima, max);
    pstoreu(sums, sum);
    T inverse[queries_at_once];
    for (Index q = 0; q < queries_at_once; ++q) {
      const bool unseen = sums[q] == T(0);
      inverse[q] = unseen ? T(0) : T(1) / sums[q];
      // A stand-in sees other keys.
      if (log_sum_exp != nullptr && q < queries.count) {
        log_sum_exp[head * inputs_.query.rows() + row(q)] = natural_log_sum_exp(maxima[q], sums[q]);
      }
    }
    const Index width = heads_.value_width();
    const bool whole = width == value_width_;
    T* result[queries_at_once];
    for (Index q = 0; q < queries_at_once; ++q) {
      const bool there = whole && q < queries.count;
      result[q] = there ? out.row(row(q)) + head * width : buffers.out + q * value_width_;
    }
    const T* const values = keys.value + first * value_width_;
    const auto finish = [&](Index q, Index c, const Packet<T>& value) {
      const Packet<T> factor = ploadu<Packet<T>>(buffers.factors + head * value_width_ + c);
      store(result[q] + c, Packet<T>(pmul(pmul(value, pset1<Packet<T>>(inverse[q])), factor)));
    };
    for_each_feature_block<T>(value_width_, [&](auto vectors, Index c) {
      if (!keys.values_are_finite) return add_weighed_values(buffers.weights, count, values, c, vectors, finish);
      multiply<decltype(vectors)::value>(
          Broadcast<T>{buffers.weights, 1, queries_at_once}, queries_at_once, values + c, value_width_, count,
          [](Index, int) { return pset1<Packet<T>>(T(0)); },
          [&](Index q, int v, const Packet<T>& value) { finish(q, c + v * lanes<T>, value); });
    });
    if (whole) return;
    for (Index q = 0; q < queries.count; ++q) copy_row(result[q], width, out.row(row(q)) + head * width);
  }

  // finish(query, c, sum) takes the weighted sums of `vectors` vectors of values, from column c on, where infinity or
  // NaN stands among them. A weight of zero, as every key has that a query does not see, adds nothing, where a product
  // would add NaN.
  template <class Finish>
  void add_weighed_values(const T* weights, Index count, const T* values, Index c, int vectors, Finish&& finish) const {
    for (const Index end = c + vectors * lanes<T>; c < end; c += lanes<T>) {
      for (Index q = 0; q < queries_at_once; ++q) {
        Packet<T> sum = pset1<Packet<T>>(T(0));
        for (Index j = 0; j < count; ++j) {
          const T weight = weights[j * queries_at_once + q];
          if (weight == T(0)) continue;
          sum = pmadd(pset1<Packet<T>>(weight), ploadu<Packet<T>>(values + j * value_width_ + c), sum);
        }
        finish(q, c, sum);
      }
    }
  }

  // Scores as [key][query], -infinity where a query does not see a key; and their maxima, that of query q in all lanes
  // that are q modulo 4.
  NEARFAR_NO_INLINE Packet<T> score(const T* const (&query)[queries_at_once], const Bounds& bounds, const Keys& keys,
                                    T* scores, Spread& fetch) const {
    const Packet<T> from = ploadu<Packet<T>>(bounds.from);
    const Packet<T> end = ploadu<Packet<T>>(bounds.end);
    const Packet<T> scale = pset1<Packet<T>>(scale_);
    const Packet<T> hidden = pset1<Packet<T>>(-infinity<T>);
    Packet<T> largest = hidden;
    for (Index j = bounds.keys.first; j < bounds.keys.end; j += keys_at_once, scores += products_at_once) {
      const T* key[keys_at_once];
      for (Index k = 0; k < keys_at_once; ++k) key[k] = keys.key + std::min(j + k, bounds.keys.end - 1) * key_width_;
      Packet<T> sums[product_packets<T>];
      multiply_rows<T>(query, key, key_width_, sums);
      fetch();
      const T* place = keys.place + j * queries_at_once;
      NEARFAR_UNROLL for (Index p = 0; p < product_packets<T>; ++p) {
        const Packet<T> at = ploadu<Packet<T>>(place + p * lanes<T>);
        const Packet<T> before_end = select_less(at, end, Packet<T>(pmul(sums[p], scale)), hidden);
        const Packet<T> score = select_less(at, from, hidden, before_end);
        largest = pmax(largest, score);
        pstoreu(scores + p * lanes<T>, score);
      }
    }
    return fold_across<queries_at_once>(largest, [](const auto& a, const auto& b) { return pmax(a, b); });
  }

  // Replaces count x 4 scores by weights 2^(score - max), and gives their sums, as `score` gives the maxima.
  static Packet<T> weigh(T* scores, Index count, const Packet<T>& max) {
    const Index end = count * queries_at_once;
    std::fill(scores + end, scores + round_up(end, 4 * lanes<T>), -infinity<T>);
    const Packet<T> shift = shift_of(max);
    Packet<T> total = pset1<Packet<T>>(T(0));
    for (Index s = 0; s < end; s += 4 * lanes<T>) {
      Packet<T> weight[4];
      NEARFAR_UNROLL for (int p = 0; p < 4; ++p) weight[p] = psub(ploadu<Packet<T>>(scores + s + p * lanes<T>), shift);
      exp2<T>(weight);
      NEARFAR_UNROLL for (int p = 0; p < 4; ++p) {
        pstoreu(scores + s + p * lanes<T>, weight[p]);
        total = padd(total, weight[p]);
      }
    }
    return fold_across<queries_at_once>(total, [](const auto& a, const auto& b) { return padd(a, b); });
  }

  const Heads& heads_;
  Window window_;
  T scale_;
  const Inputs<Scalar>& inputs_;
  Tokens<const T> factors_;
  Index key_width_;
  Index value_width_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
