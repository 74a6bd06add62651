#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/detail/tiles.hpp>
#include <nearfar/engine/key_tile.hpp>
#include <nearfar/engine/microkernel.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>
#include <cmath>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Softmax attention through a window of few keys.
///
/// A panel of queries on the vector lanes visits what any of its queries sees: with a window no wider than the panel
/// most of that is masked away. Here four queries at a time meet their keys, features on the lanes: scores as products
/// of rows, sixteen of which are summed across lanes by one transposition, all kept as [key][query]; then their
/// softmax, in one pass, since they all fit; then values by the register microkernel. Heads are innermost, so that the
/// rows of the next one are fetched while this one computes.
template <class Scalar>
class NarrowWindow {
 public:
  using T = Accumulator<Scalar>;

  /// The most keys in a window that is narrow in this sense.
  static constexpr Index most = 64;

  /// Where `factors` (heads.query x value_dim) has rows, the features of out are multiplied by it.
  NarrowWindow(const Heads& heads, Window window, double scale, const Inputs<Scalar>& inputs, Tokens<const T> factors)
      : heads_(heads), window_(window), scale_(T(scale) * log2_e<T>), inputs_(inputs), factors_(factors) {}

  /// Whether the window is narrow, and heads are whole vectors.
  bool suits() const {
    return lanes<T> % queries_at_once == 0 && heads_.dim % lanes<T> == 0 && heads_.value_width() % lanes<T> == 0 &&
           window_.left < most && window_.right < most && window_keys() <= most;
  }

  void attend(Work& work, Tokens<Scalar> out, double* log_sum_exp) const {
    const Tiles tiles(work, inputs_, (KeyTile<T>::capacity - window_keys() + 1) / queries_at_once * queries_at_once);
    work.for_each(tiles.count(), [&](Index task, Scratch& scratch) {
      const Tile tile = tiles[task];
      const Sequence rows = sequence(inputs_, tile.sequence);
      KeyTile<T> keys(scratch, heads_.dim, heads_.value_width());
      constexpr Index room = queries_at_once * (KeyTile<T>::capacity + 2 * lanes<T>);
      Lists lists{scratch.take<T>(queries_at_once * heads_.dim), scratch.take<T>(room), scratch.take<T>(room), {}};
      for (Index h = 0; h < heads_.query; ++h) {
        look_ahead(rows, tile, h + 1, out, lists.ahead);
        if (h % heads_.group() == 0) gather(rows, tile, h / heads_.group(), keys, lists);
        for (Index i = 0; i < tile.count; i += queries_at_once) {
          attend(rows, tile, i, h, keys, lists, out, log_sum_exp);
        }
      }
    });
  }

 private:
  static constexpr Index queries_at_once = 4;
  static constexpr Index keys_at_once = vector_registers >= 32 ? 4 : 2;
  static constexpr Index scores_at_once = queries_at_once * keys_at_once;
  static constexpr Index packets_at_once = (scores_at_once + lanes<T> - 1) / lanes<T>;
  static constexpr int value_vectors = vector_registers >= 32 ? 4 : 2;

  // Four queries; the places of the tile's keys, counted from its first query, and the scores, later weights, of those
  // that the four see. Both lists are [key][query].
  struct Lists {
    T* query;
    T* place;
    T* weight;
    Lookahead ahead;
  };

  Index window_keys() const { return window_.left + window_.right + 1; }
  Band band(const Sequence& rows) const { return {window_, rows.query_count, rows.key_count}; }

  void gather(const Sequence& rows, const Tile& tile, Index key_head, KeyTile<T>& keys, Lists& lists) const {
    const std::uint8_t* mask = key_mask(inputs_, rows);
    const Range seen = band(rows).seen_by_any(tile.first, tile.count);
    keys.clear();
    for (Index j = seen.first; j < seen.end; ++j) {
      if (mask != nullptr && mask[j] == 0) continue;
      keys.append(inputs_.key.row(rows.key_begin + j) + key_head * heads_.dim,
                  inputs_.value.row(rows.key_begin + j) + key_head * heads_.value_width(), j);
      std::fill_n(lists.place + (keys.count() - 1) * queries_at_once, queries_at_once, T(j - tile.first));
    }
    // No query sees the places after the last key, which complete a group of keys_at_once.
    std::fill_n(lists.place + keys.count() * queries_at_once, scores_at_once, infinity<T>);
  }

  void look_ahead(const Sequence& rows, const Tile& tile, Index head, Tokens<Scalar> out, Lookahead& ahead) const {
    ahead.clear();
    if (head == heads_.query) return;
    const Index query = rows.query_begin + tile.first;
    const Index width = heads_.value_width();
    ahead.add(inputs_.query.row(query) + head * heads_.dim, inputs_.query.stride(), tile.count, heads_.dim);
    if (head % heads_.group() == 0) {
      const Range seen = band(rows).seen_by_any(tile.first, tile.count);
      const Index key_head = head / heads_.group();
      ahead.add(inputs_.key.row(rows.key_begin + seen.first) + key_head * heads_.dim, inputs_.key.stride(),
                seen.count(), heads_.dim);
      ahead.add(inputs_.value.row(rows.key_begin + seen.first) + key_head * width, inputs_.value.stride(), seen.count(),
                width);
    }
    ahead.add(out.row(query) + head * width, out.stride(), tile.count, width);
  }

  // Queries `first` to first + 3 of a tile.
  void attend(const Sequence& rows, const Tile& tile, Index first, Index head, const KeyTile<T>& keys, Lists& lists,
              Tokens<Scalar> out, double* log_sum_exp) const {
    const Index queries = std::min(queries_at_once, tile.count - first);
    const Index row = rows.query_begin + tile.first + first;
    for (Index q = 0; q < queries_at_once; ++q) {
      // Where fewer than four are left the last one stands in for the others, and is written once.
      const Scalar* query = inputs_.query.row(row + std::min(q, queries - 1)) + head * heads_.dim;
      for (Index c = 0; c < heads_.dim; ++c) lists.query[q * heads_.dim + c] = scale_ * T(query[c]);
    }
    const Band visible = band(rows);
    const Range any = keys.within(visible.seen_by_any(tile.first + first, queries));
    const Index count = any.count();

    T max[queries_at_once], sum[queries_at_once];
    score(keys, any, visible, tile.first, first, lists, max);
    weigh(lists.weight, count, max, sum);

    T* results[queries_at_once];
    T inverse[queries_at_once];
    for (Index q = 0; q < queries_at_once; ++q) {
      const bool unseen = sum[q] == T(0);
      inverse[q] = unseen ? T(0) : T(1) / sum[q];
      results[q] = q < queries ? out.row(row + q) + head * heads_.value_width() : nullptr;
      if (log_sum_exp == nullptr || q >= queries) continue;
      log_sum_exp[head * inputs_.query.rows() + row + q] = natural_log_sum_exp(max[q], sum[q]);
    }
    const Broadcast<T> weights{lists.weight, 1, queries_at_once};
    const auto write = [&](Index c, Index q, const Packet<T>& value) {
      if (results[q] == nullptr) return;
      const Packet<T> factor =
          factors_.rows() == 0 ? pset1<Packet<T>>(T(1)) : ploadu<Packet<T>>(factors_.row(head) + c);
      pstoreu(results[q] + c, pmul(factor, pmul(value, pset1<Packet<T>>(inverse[q]))));
    };
    const auto zero = [](Index, int) { return pset1<Packet<T>>(T(0)); };
    const Broadcast<T> values = keys.value(any.first);
    Index c = 0;
    for (; c + value_vectors * lanes<T> <= heads_.value_width(); c += value_vectors * lanes<T>) {
      multiply<value_vectors>(weights, queries_at_once, values.data + c, values.row_stride, count, zero,
                              [&](Index q, int v, const Packet<T>& value) { write(c + v * lanes<T>, q, value); });
    }
    for (; c < heads_.value_width(); c += lanes<T>) {
      multiply<1>(weights, queries_at_once, values.data + c, values.row_stride, count, zero,
                  [&](Index q, int, const Packet<T>& value) { write(c, q, value); });
    }
  }

  // Scores of the keys in `any` as [key][query], -infinity where a query does not see a key, and their maxima.
  void score(const KeyTile<T>& keys, Range any, const Band& visible, Index tile, Index first, Lists& lists,
             T (&max)[queries_at_once]) const {
    T froms[lanes<T>], ends[lanes<T>], maxima[lanes<T>];
    for (Index lane = 0; lane < lanes<T>; ++lane) {
      const Index query = tile + first + lane % queries_at_once;
      froms[lane] = T(visible.first(query) - tile);
      ends[lane] = T(visible.end(query) - tile);
    }
    const Packet<T> from = ploadu<Packet<T>>(froms);
    const Packet<T> end = ploadu<Packet<T>>(ends);
    const Packet<T> hidden = pset1<Packet<T>>(-infinity<T>);
    Packet<T> largest = hidden;
    const T* key[keys_at_once];
    for (Index j = any.first; j < any.end; j += keys_at_once) {
      for (Index k = 0; k < keys_at_once; ++k) key[k] = keys.key(std::min(j + k, any.end - 1)).data;
      Packet<T> sums[packets_at_once];
      multiply_rows(lists.query, key, sums, lists.ahead);
      const T* place = lists.place + j * queries_at_once;
      T* scores = lists.weight + (j - any.first) * queries_at_once;
      NEARFAR_UNROLL for (Index p = 0; p < packets_at_once; ++p) {
        const Packet<T> at = ploadu<Packet<T>>(place + p * lanes<T>);
        const Packet<T> score = pselect(pcmp_lt(at, from), hidden, pselect(pcmp_lt(at, end), sums[p], hidden));
        largest = pmax(largest, score);
        pstoreu(scores + p * lanes<T>, score);
      }
    }
    pstoreu(maxima, largest);
    std::fill_n(max, queries_at_once, -infinity<T>);
    for (Index lane = 0; lane < lanes<T>; ++lane) {
      T& m = max[lane % queries_at_once];
      m = std::max(m, maxima[lane]);
    }
  }

  // The products of four queries with some keys, [key][query]: each summed over the lanes of its accumulator.
  void multiply_rows(const T* query, const T* (&key)[keys_at_once], Packet<T> (&sums)[packets_at_once],
                     Lookahead& ahead) const {
    Packet<T> product[scores_at_once];
    NEARFAR_UNROLL for (Index s = 0; s < scores_at_once; ++s) product[s] = pset1<Packet<T>>(T(0));
    for (Index c = 0; c < heads_.dim; c += lanes<T>) {
      ahead.step();
      Packet<T> q[queries_at_once];
      NEARFAR_UNROLL for (Index i = 0; i < queries_at_once; ++i) {
        q[i] = ploadu<Packet<T>>(query + i * heads_.dim + c);
      }
      NEARFAR_UNROLL for (Index k = 0; k < keys_at_once; ++k) {
        const Packet<T> features = ploadu<Packet<T>>(key[k] + c);
        NEARFAR_UNROLL for (Index i = 0; i < queries_at_once; ++i) {
          product[k * queries_at_once + i] = pmadd(q[i], features, product[k * queries_at_once + i]);
        }
      }
    }
    NEARFAR_UNROLL for (Index p = 0; p < packets_at_once; ++p) sums[p] = sum_lanes(product + p * lanes<T>);
  }

  // Replaces count x 4 scores by weights 2^(score - max) and sums them up for each query.
  static void weigh(T* scores, Index count, const T (&max)[queries_at_once], T (&sum)[queries_at_once]) {
    constexpr Index together = 4 * lanes<T>;
    T shifts[lanes<T>], totals[lanes<T>];
    for (Index lane = 0; lane < lanes<T>; ++lane) {
      const T largest = max[lane % queries_at_once];
      shifts[lane] = largest == -infinity<T> ? T(0) : largest;
    }
    const Index end = count * queries_at_once;
    std::fill(scores + end, scores + round_up(end, together), -infinity<T>);
    const Packet<T> shift = ploadu<Packet<T>>(shifts);
    Packet<T> total = pset1<Packet<T>>(T(0));
    for (Index s = 0; s < end; s += together) {
      Packet<T> weight[4];
      NEARFAR_UNROLL for (Index p = 0; p < 4; ++p) {
        weight[p] = psub(ploadu<Packet<T>>(scores + s + p * lanes<T>), shift);
      }
      exp2<T>(weight);
      NEARFAR_UNROLL for (Index p = 0; p < 4; ++p) {
        pstoreu(scores + s + p * lanes<T>, weight[p]);
        total = padd(total, weight[p]);
      }
    }
    pstoreu(totals, total);
    std::fill_n(sum, queries_at_once, T(0));
    for (Index lane = 0; lane < lanes<T>; ++lane) sum[lane % queries_at_once] += totals[lane];
  }

  const Heads& heads_;
  Window window_;
  T scale_;
  const Inputs<Scalar>& inputs_;
  Tokens<const T> factors_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
