#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/detail/stores.hpp>
#include <nearfar/engine/microkernel.hpp>
#include <nearfar/engine/softmax/row_products.hpp>
#include <nearfar/engine/tiles.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The backward pass of attention through a window of few keys, from the saved log-sum-exp L and delta:
///
///   p_ij = 2^(s_ij - L_i)          ds_ij = p_ij (grad_out_i . v_j - delta_i)
///   grad_q_i = scale sum_j ds_ij k_j      grad_k_j = scale sum_i ds_ij q_i      grad_v_j = sum_i p_ij grad_out_i
///
/// A task owns a tile of tokens, their queries and their keys. It takes p and ds of all pairs that one of these is part
/// of: those across the edge of a tile are taken by both neighbours, and no gradient is summed across tasks. Queries
/// and keys meet in blocks of 4 x 4, rows as they stand and kept as [key][query], as in NarrowWindow.
template <class Scalar>
class NarrowWindowBackward {
 public:
  using T = Accumulator<Scalar>;

  NarrowWindowBackward(const Heads& heads, Window window, double scale, const Inputs<Scalar>& inputs,
                       const double* log_sum_exp, Tokens<const Scalar> grad_out, const T* delta,
                       const InputGradients<Scalar>& gradients)
      : heads_(heads),
        window_(window),
        scale_(T(scale)),
        log2_scale_(log2_scale<T>(scale)),
        inputs_(inputs),
        log_sum_exp_(log_sum_exp),
        grad_out_(grad_out),
        delta_(delta),
        gradients_(gradients),
        dim_(round_up(heads.dim, lanes<T>)),
        value_dim_(round_up(heads.value_width(), lanes<T>)) {}

  /// Whether the window is narrow, and each token has a query and a key.
  bool suits() const {
    for (Index b = 0; b < sequence_count(inputs_); ++b) {
      const Sequence rows = sequence(inputs_, b);
      if (rows.query_count != rows.key_count) return false;
    }
    return std::is_same_v<Scalar, T> && meets_by_rows<T>(heads_, window_);
  }

  void backward(Work& work) const {
    const Tiles tiles(work, inputs_, tokens_a_tile);
    const bool past = heads_.group() == 1 && past_caches(gradients_.query, heads_.dim) &&
                      past_caches(gradients_.key, heads_.dim) && past_caches(gradients_.value, heads_.value_width());
    work.for_each(tiles.count(), [&](Index task, Scratch& scratch) {
      const Tile tile = tiles[task];
      Pairs pairs(*this, sequence(inputs_, tile.sequence), tile, scratch);
      hide(pairs);
      look_ahead(pairs, work.threads(), past);
      with_store(past, [&](KeepOrPastCaches store) {
        for (Index g = 0; g < heads_.key_value; ++g) backward(g, pairs, store);
      });
    });
  }

 private:
  static constexpr Index tokens_a_tile = 64;
  static constexpr Index block = queries_at_once * queries_at_once;  // of pairs

  /// The tokens of a tile and those before and behind that meet them, in groups of four: their rows of one head, filled
  /// up, zero where no token is or may be seen, and p and ds of their pairs. Queries of group g meet the keys of the
  /// groups from g + first to g + last.
  struct Pairs {
    Pairs(const NarrowWindowBackward& of, const Sequence& of_rows, const Tile& of_tile, Scratch& scratch)
        : rows(of_rows),
          tile(of_tile),
          first(-round_up(of.window_.left, queries_at_once) / queries_at_once),
          last(round_up(of.window_.right, queries_at_once) / queries_at_once),
          own{std::max(-first, last), std::max(-first, last) + round_up(tile.count, queries_at_once) / queries_at_once},
          groups(own.first + own.end),
          begin(tile.first - own.first * queries_at_once) {
      const auto take = [&](Index width) { return scratch.take<T>(groups * queries_at_once * width); };
      query = take(of.dim_);
      key = take(of.dim_);
      value = take(of.value_dim_);
      grad_out = take(of.value_dim_);
      aside = scratch.take<T>(queries_at_once * std::max(of.dim_, of.value_dim_));
      p = take(queries_at_once * (last - first + 1));
      ds = take(queries_at_once * (last - first + 1));
      for (T** numbers : {&shift, &rest, &delta}) *numbers = scratch.take<T>(groups * lanes<T>);
      hidden_keys = take(queries_at_once);
      hidden = scratch.take<T>((last - first + 1) * block);
    }

    /// Where the pairs stand of a group of queries and one of keys.
    Index at(Index queries, Index keys) const {
      return (queries * (last - first + 1) + keys - queries - first) * block;
    }

    /// Whether a token is one of the sequence's, a group one of the tile's own.
    bool holds(Index token) const { return 0 <= token && token < rows.query_count; }
    bool owns(Index group) const { return own.first <= group && group < own.end; }

    /// Those of these groups of keys that the queries of a group meet: a group that is not the tile's own meets its
    /// own alone.
    Range met_by(Index queries) const {
      const Range met{queries + first, queries + last + 1};
      if (owns(queries)) return met;
      return {std::max(met.first, own.first), std::min(met.end, own.end)};
    }

    Sequence rows;
    Tile tile;
    Index first;
    Index last;
    Range own;
    Index groups;
    Index begin;  // the first token
    T* query;
    T* key;
    T* value;
    T* grad_out;
    T* aside;  // for gradients of one group
    T* p;
    T* ds;
    T* shift;  // of each group of queries on the lanes, over and over: their Shift
    T* rest;
    T* delta;
    T* hidden_keys;  // of each key, four times: -infinity if it may not be seen, else 0
    T* hidden;       // of each pair of groups, by how far they are apart: likewise what the window hides
    Spread fetch;    // what the next tile reads
  };

  void backward(Index key_head, Pairs& pairs, KeepOrPastCaches store) const {
    const Index dim = heads_.dim, value_dim = heads_.value_width();
    const std::uint8_t* mask = key_mask(inputs_, pairs.rows);
    const auto shown = [&](Index i) { return mask == nullptr || mask[i] != 0; };
    const auto any = [](Index) { return true; };
    load(inputs_.key, pairs.rows.key_begin, key_head * dim, dim, pairs, shown, pairs.key);
    load(inputs_.value, pairs.rows.key_begin, key_head * value_dim, value_dim, pairs, shown, pairs.value);
    const Index first_head = key_head * heads_.group();
    for (Index h = first_head; h < first_head + heads_.group(); ++h) {
      load(inputs_.query, pairs.rows.query_begin, h * dim, dim, pairs, any, pairs.query);
      load(grad_out_, pairs.rows.query_begin, h * value_dim, value_dim, pairs, any, pairs.grad_out);
      take_shifts(h, pairs);
      for (Index queries = 0; queries < pairs.groups; ++queries) {
        weigh(queries, pairs);
        if (pairs.owns(queries)) sum_over_keys(h, queries, pairs, store);
      }
      const bool add = h > first_head;
      for (Index keys = pairs.own.first; keys < pairs.own.end; ++keys) {
        sum_over_queries(pairs.ds, pairs.query, scale_, keys, pairs, gradients_.key.head(key_head, dim), add, store);
        sum_over_queries(pairs.p, pairs.grad_out, T(1), keys, pairs, gradients_.value.head(key_head, value_dim), add,
                         store);
      }
    }
  }

  /// Copies the rows of one head, zeros in the place of what is not there or not shown. By itself, as what sums and
  /// weighs: within the walk their pointers do not fit the registers.
  template <class Shown>
  NEARFAR_NO_INLINE static void load(Tokens<const Scalar> from, Index begin, Index column, Index width,
                                     const Pairs& pairs, Shown&& shown, T* to) {
    const Index filled = round_up(width, lanes<T>);
    for (Index i = pairs.begin; i < pairs.begin + pairs.groups * queries_at_once; ++i, to += filled) {
      if (pairs.holds(i) && shown(i)) {
        copy_filled(from.row(begin + i) + column, width, to);
      } else {
        std::fill_n(to, filled, T(0));
      }
    }
  }

  /// What hides pairs.
  void hide(Pairs& pairs) const {
    const std::uint8_t* mask = key_mask(inputs_, pairs.rows);
    for (Index j = 0; j < pairs.groups * queries_at_once; ++j) {
      const Index key = pairs.begin + j;
      const bool shown = pairs.holds(key) && (mask == nullptr || mask[key] != 0);
      std::fill_n(pairs.hidden_keys + j * queries_at_once, queries_at_once, shown ? T(0) : -infinity<T>);
    }
    for (Index d = pairs.first; d <= pairs.last; ++d) {
      for (Index pair = 0; pair < block; ++pair) {
        const Index ahead = d * queries_at_once + pair / queries_at_once - pair % queries_at_once;
        const bool seen = -window_.left <= ahead && ahead <= window_.right;
        pairs.hidden[(d - pairs.first) * block + pair] = seen ? T(0) : -infinity<T>;
      }
    }
  }

  /// What p and ds of a head's queries are shifted by.
  void take_shifts(Index head, Pairs& pairs) const {
    for (Index i = 0; i < pairs.groups * queries_at_once; ++i) {
      const Index at = head * inputs_.query.rows() + pairs.rows.query_begin + pairs.begin + i;
      const Shift<T> shift = pairs.holds(pairs.begin + i) ? Shift<T>(log_sum_exp_[at]) : Shift<T>();
      for (Index lane = i % queries_at_once; lane < lanes<T>; lane += queries_at_once) {
        const Index to = i / queries_at_once * lanes<T> + lane;
        pairs.shift[to] = shift.nearest;
        pairs.rest[to] = shift.rest;
        pairs.delta[to] = shift.sees() ? delta_[at] : T(0);
      }
    }
  }

  /// p and ds of all pairs of a group of queries.
  NEARFAR_NO_INLINE void weigh(Index queries, Pairs& pairs) const {
    const T *query[queries_at_once], *grad_out[queries_at_once];
    for (Index q = 0; q < queries_at_once; ++q) {
      query[q] = pairs.query + (queries * queries_at_once + q) * dim_;
      grad_out[q] = pairs.grad_out + (queries * queries_at_once + q) * value_dim_;
    }
    const auto of_queries = [&](const T* numbers) { return ploadu<Packet<T>>(numbers + queries * lanes<T>); };
    const Packet<T> shift = of_queries(pairs.shift), rest = of_queries(pairs.rest), delta = of_queries(pairs.delta);
    const Packet<T> scale = pset1<Packet<T>>(log2_scale_);
    const Range met = pairs.met_by(queries);
    for (Index first = met.first * queries_at_once; first < met.end * queries_at_once; first += keys_at_once) {
      const T *key[keys_at_once], *value[keys_at_once];
      for (Index k = 0; k < keys_at_once; ++k) {
        key[k] = pairs.key + (first + k) * dim_;
        value[k] = pairs.value + (first + k) * value_dim_;
      }
      Packet<T> score[product_packets<T>], grad_p[product_packets<T>];
      multiply_rows<T>(query, key, dim_, score);
      multiply_rows<T>(grad_out, value, value_dim_, grad_p);
      pairs.fetch();
      const Index at = pairs.at(queries, 0) + first * queries_at_once;
      const T* const hidden_pairs = pairs.hidden + (at - pairs.at(queries, queries + pairs.first));
      NEARFAR_UNROLL for (Index v = 0; v < product_packets<T>; ++v) {
        const Packet<T> hidden = padd(ploadu<Packet<T>>(hidden_pairs + v * lanes<T>),
                                      ploadu<Packet<T>>(pairs.hidden_keys + first * queries_at_once + v * lanes<T>));
        const Packet<T> shown = weight_exponent(Packet<T>(pmul(score[v], scale)), shift, rest);
        const Packet<T> p = exp2<T>(select_less(hidden, pset1<Packet<T>>(T(0)), hidden, shown));
        pstoreu(pairs.p + at + v * lanes<T>, p);
        pstoreu(pairs.ds + at + v * lanes<T>, pmul(p, psub(grad_p[v], delta)));
      }
    }
  }

  /// Where vectors of a group's gradients go: to their rows, or aside where a row is not whole vectors, or not there.
  struct Rows {
    Rows(Tokens<Scalar> to, Index begin, Index group, const Pairs& pairs, bool add)
        : width(to.cols()), whole(width == round_up(width, lanes<T>)) {
      for (Index k = 0; k < queries_at_once; ++k) {
        const Index token = pairs.begin + group * queries_at_once + k;
        own[k] = pairs.holds(token) ? to.row(begin + token) : nullptr;
        row[k] = whole && own[k] != nullptr ? own[k] : pairs.aside + k * round_up(width, lanes<T>);
        if (add && !whole && own[k] != nullptr) copy_row(own[k], width, row[k]);
      }
    }

    void finish() const {
      if (whole) return;
      for (Index k = 0; k < queries_at_once; ++k) {
        if (own[k] != nullptr) copy_row(row[k], width, own[k]);
      }
    }

    Index width;
    bool whole;
    T* own[queries_at_once];
    T* row[queries_at_once];
  };

  /// Writes the gradients of a group of queries.
  NEARFAR_NO_INLINE void sum_over_keys(Index head, Index queries, const Pairs& pairs, KeepOrPastCaches store) const {
    const Range met = pairs.met_by(queries);
    const Tokens to = gradients_.query.head(head, heads_.dim);
    const Rows rows(to, pairs.rows.query_begin, queries, pairs, false);
    for_each_feature_block<T>(dim_, [&](auto vectors, Index c) {
      multiply<decltype(vectors)::value>(
          Broadcast<T>{pairs.ds + pairs.at(queries, met.first), 1, queries_at_once}, queries_at_once,
          pairs.key + met.first * queries_at_once * dim_ + c, dim_, met.count() * queries_at_once,
          [](Index, int) { return pset1<Packet<T>>(T(0)); },
          [&](Index q, int v, const Packet<T>& sum) {
            store(rows.row[q] + c + v * lanes<T>, Packet<T>(pmul(sum, pset1<Packet<T>>(scale_))));
          });
    });
    rows.finish();
  }

  /// to_j = scale sum_i factor_ij row_i for a group of keys j over the queries i that they meet, or adds that to it.
  NEARFAR_NO_INLINE void sum_over_queries(const T* factor, const T* from, T scale, Index keys, const Pairs& pairs,
                                          Tokens<Scalar> to, bool add, KeepOrPastCaches store) const {
    const Index width = round_up(to.cols(), lanes<T>);
    const Rows rows(to, pairs.rows.key_begin, keys, pairs, add);
    for_each_feature_block<T>(width, [&](auto vectors_, Index c) {
      constexpr int vectors = decltype(vectors_)::value;
      Packet<T> sum[queries_at_once][vectors];
      NEARFAR_UNROLL for (Index k = 0; k < queries_at_once; ++k) {
        NEARFAR_UNROLL for (int v = 0; v < vectors; ++v) sum[k][v] = pset1<Packet<T>>(T(0));
      }
      for (Index queries = keys - pairs.last; queries <= keys - pairs.first; ++queries) {
        multiply_add(sum, Broadcast<T>{factor + pairs.at(queries, keys), queries_at_once, 1},
                     from + queries * queries_at_once * width + c, width, queries_at_once);
      }
      for (Index k = 0; k < queries_at_once; ++k) {
        for (int v = 0; v < vectors; ++v) {
          const Packet<T> own = pmul(sum[k][v], pset1<Packet<T>>(scale));
          T* const at = rows.row[k] + c + v * lanes<T>;
          // The sum over a group of heads is read again before it is done.
          add ? pstoreu(at, padd(ploadu<Packet<T>>(at), own)) : store(at, own);
        }
      }
    });
    rows.finish();
  }

  /// Fetches what this thread's next tile likely reads that this one has not.
  void look_ahead(Pairs& pairs, Index threads, bool past) const {
    Lookahead ahead;
    const Index step = threads * tokens_a_tile, end = pairs.begin + pairs.groups * queries_at_once;
    const Range met{std::max(pairs.begin + step, end), end + step};
    const Range own{pairs.tile.first + step, pairs.tile.first + step + tokens_a_tile};
    const auto add = [&](const auto& tokens, Index begin, Range next) {
      const Index count = std::min(next.end, pairs.rows.query_count) - next.first;
      ahead.add(tokens.middle_rows(begin + next.first, count));
    };
    add(inputs_.key, pairs.rows.key_begin, met);
    add(inputs_.value, pairs.rows.key_begin, met);
    add(inputs_.query, pairs.rows.query_begin, met);
    add(grad_out_, pairs.rows.query_begin, met);
    if (!past) {
      add(gradients_.query, pairs.rows.query_begin, own);
      add(gradients_.key, pairs.rows.key_begin, own);
      add(gradients_.value, pairs.rows.key_begin, own);
    }
    pairs.fetch = Spread(
        ahead, heads_.query * pairs.own.count() * (pairs.last - pairs.first + 1) * (queries_at_once / keys_at_once));
  }

  const Heads& heads_;
  Window window_;
  T scale_;
  T log2_scale_;
  const Inputs<Scalar>& inputs_;
  const double* log_sum_exp_;
  Tokens<const Scalar> grad_out_;
  const T* delta_;
  const InputGradients<Scalar>& gradients_;
  Index dim_;  // of rows that are filled up
  Index value_dim_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
