#pragma once

#include <nearfar/engine/linear/segmented_scan.hpp>
#include <nearfar/engine/linear/token_tile.hpp>

#include <cmath>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The sum of linear attention over any number of feature maps phi_r, forward and backward:
///
///   out_i = sum_r w_r * (phi_r(q_i) S_ri) g_ri,    S_ri = sum_j phi_r(k_j)^T v_j,    z_ri = sum_j phi_r(k_j)
///
/// over the keys j that query i sees, with g_ri = 1 / (phi_r(q_i) . z_ri + eps), or 1 / sqrt(n_k) where there is no
/// eps, and weights w_r of each query head and feature, 1 unless given.
///
/// Its gradient, with G_i = grad_out_i * w_r, is three sums of the same form, the first over the keys that a query sees
/// and the others, from the last token to the first, over the queries that see a key:
///
///   grad phi(q_i) = g_i G_i . V^T K + s_i z_i            with K, V the features and values of the keys seen,
///   s_i           = -g_i phi(q_i) . (g_i G_i . V^T K)    the gradient of the row sum,
///   grad phi(k_j) = v_j . (g G)^T Q + sum_i s_i phi(q_i)
///   grad v_j      = phi(k_j) . Q^T (g G)
template <class T>
class KernelSum {
 public:
  Heads heads;
  std::span<const AnyFeatureMap> feature_maps;
  bool causal;
  bool normalize_features;
  std::optional<double> eps;

  Index maps() const { return static_cast<Index>(feature_maps.size()); }
  const AnyFeatureMap& map(Index r) const { return feature_maps[static_cast<std::size_t>(r)]; }

  /// Numbers a key/value head in the sums S and z of all maps.
  Index sums_size() const { return maps() * map_size(); }

  /// What a stream remembers: the sums of each head and map, then their excess, and whether any key was visible yet.
  struct State {
    std::vector<T> sums;
    Heads heads;
    bool has_keys = false;
  };

  State start() const { return {std::vector<T>(state_count(), T(0)), heads}; }

  void check_state(std::string_view mechanism, const State& state) const {
    require(state.sums.size() == state_count(), mechanism, "this state holds ", state.sums.size(),
            " sums, but its heads and maps need ", state_count(), ": take it from start().");
    check_state_heads(mechanism, state.heads, heads);
  }

  struct Forward {
    const Inputs<T>& inputs;
    Tokens<T> out;
    Tokens<const T> weights = {};             ///< w, (maps * heads.query) x value_dim; none for 1
    bool add = false;                         ///< whether to add to what stands in out
    Matrix<T>* inverse_normalizer = nullptr;  ///< takes g, n_q x (maps * heads.query), unless null
    State* state = nullptr;                   ///< of a stream, which goes on, unless null
  };

  struct Backward {
    const Inputs<T>& inputs;
    Tokens<const T> grad_out;
    const Matrix<T>& inverse_normalizer;
    InputGradients<T> grad;
    Tokens<const T> weights = {};
    Tokens<T> grad_weights = {};  ///< always added to; none where there are no weights
    bool add = false;             ///< whether to add to what stands in grad
  };

  void forward(const Forward& call, Work& work) const;
  void backward(const Backward& call, Work& work) const;

  /// The first key of the sequence that may be seen, or how many keys it has.
  static Index first_visible_key(const Inputs<T>& inputs, const Sequence& s) {
    const VisibleKeys visible(inputs, s, false);
    Index j = 0;
    while (j < s.key_count && !visible(j)) ++j;
    return j;
  }

 private:
  std::size_t state_count() const { return static_cast<std::size_t>(2 * heads.key_value * sums_size()); }
  Index dim() const { return heads.dim; }
  Index value_dim() const { return heads.value_width(); }
  Index padded_dim() const { return round_up(dim(), lanes<T>); }
  Index padded_value_dim() const { return round_up(value_dim(), lanes<T>); }
  // Of the sum S of a map, in whole groups of rows, and of its transpose; behind them stands z.
  Index state_size() const { return round_up(dim(), state_rows) * padded_value_dim(); }
  Index transposed_state_size() const { return round_up(value_dim(), state_rows) * padded_dim(); }
  Index map_size() const { return state_size() + padded_dim(); }
  Index transposed_map_size() const { return transposed_state_size() + padded_dim(); }
  // With the gradient of the weights, and for each query head.
  Index weighted_map_size() const { return map_size() + padded_value_dim(); }
  Index weighted_sums_size() const { return heads.group() * maps() * weighted_map_size(); }

  /// Queries along the keys they see.
  Alignment queries_along_keys(const Inputs<T>& inputs, Index b, bool has_keys) const {
    const Sequence s = sequence(inputs, b);
    const Index first_key = has_keys ? 0 : first_visible_key(inputs, s);
    if (!causal) {
      const bool seeing = has_keys || first_key < s.key_count;
      return {seeing ? 0 : s.query_count, s.query_count, s.key_count, s.key_count};
    }
    const Index shift = s.key_count - s.query_count;
    const Index first = std::clamp<Index>(first_key - shift, 0, s.query_count);
    return {first, s.query_count, first + shift, s.key_count};
  }

  /// Keys along the queries that see them, from the last token to the first.
  Alignment keys_along_queries(const Inputs<T>& inputs, Index b) const {
    const Alignment forward = queries_along_keys(inputs, b, false);
    const Index seeing = forward.query_count - forward.first_query;
    return {0, forward.key_count, causal ? 0 : seeing, seeing};
  }

  using Rows = TokenRows<const T>;

  /// The weights of one map and head.
  RowArray<const T> weight(Tokens<const T> weights, Index r, Index h) const {
    return {weights.row(r * heads.query + h), value_dim()};
  }

  /// One head of the tokens of a sequence.
  template <class S>
  static TokenRows<S> queries_of(Tokens<S> tokens, const Sequence& s, Index col, bool reversed = false) {
    return token_rows(tokens, s.query_begin, s.query_count, col, reversed);
  }
  template <class S>
  static TokenRows<S> keys_of(Tokens<S> tokens, const Sequence& s, Index col, bool reversed = false) {
    return token_rows(tokens, s.key_begin, s.key_count, col, reversed);
  }

  /// How rows are first written to tokens of `dim` features a head that are written `times` times, added to after that.
  static Writes first_writes(const Tokens<T>& tokens, Index dim, bool add, Index times) {
    if (add) return Writes::added;
    return times == 1 && past_caches(tokens, dim) ? Writes::past_caches : Writes::anew;
  }

  void forward_segment(const Forward& call, const ScanStep<T>& step, Scratch& scratch) const;
  void query_gradient_segment(const Backward& call, Tokens<T> grad_row_sum, const ScanStep<T>& step,
                              Scratch& scratch) const;
  void key_gradient_segment(const Backward& call, Tokens<T> grad_row_sum, const ScanStep<T>& step,
                            Scratch& scratch) const;

  // What the products of a chunk take for its state, and `attending` times for its queries.
  Index inner_steps(const Chunk& chunk, Index attending) const {
    const Index product = chunk_tokens * dim() * value_dim() / (2 * lanes<T> * state_rows);
    // The keys beside the queries are worth half a product more.
    return maps() * (chunk.keys > 0 ? product + attending * product * 3 / 2 : attending * product);
  }

  // Row sums become g.
  void invert(T* row_sums, Index count, Index key_count) const {
    if (!eps) {
      std::fill_n(row_sums, count, T(1) / std::sqrt(static_cast<T>(key_count)));
      return;
    }
    const auto inverse = [this]<class V>(const V& sum) {
      return pdiv(pset1<V>(T(1)), padd(sum, pset1<V>(static_cast<T>(*eps))));
    };
    combine(count, row_sums, inverse, row_sums);
  }
};

template <class T>
void KernelSum<T>::forward(const Forward& call, Work& work) const {
  const Inputs<T>& inputs = call.inputs;
  if (call.inverse_normalizer != nullptr) {
    call.inverse_normalizer->setZero(inputs.query.rows(), maps() * heads.query);
  }
  const bool has_keys = call.state != nullptr && call.state->has_keys;
  const auto alignment = [&](Index b) { return queries_along_keys(inputs, b, has_keys); };
  for (Index b = 0; b < sequence_count(inputs) && !call.add; ++b) {
    call.out.middle_rows(sequence(inputs, b).query_begin, alignment(b).first_query).matrix().setZero();
  }
  scan<T>(
      work, sequence_count(inputs), heads.key_value, sums_size(), alignment,
      [&](Index, Range block, const CarriedSums<T>& room) {
        if (call.state == nullptr) return room.clear(block.count() * sums_size());
        T* const sums = call.state->sums.data() + block.first * sums_size();
        return CarriedSums<T>{sums, sums + heads.key_value * sums_size()};
      },
      [&](const ScanStep<T>& step, Scratch& scratch) { forward_segment(call, step, scratch); },
      [](Index, Range, const T*) {});
  if (call.state == nullptr) return;
  call.state->has_keys |= first_visible_key(inputs, sequence(inputs, 0)) < inputs.key.rows();
}

template <class T>
void KernelSum<T>::forward_segment(const Forward& call, const ScanStep<T>& step, Scratch& scratch) const {
  const Inputs<T>& inputs = call.inputs;
  const Sequence s = sequence(inputs, step.sequence);
  const VisibleKeys visible(inputs, s, false);
  const auto keys_of_head = [&](Index g) { return keys_of(inputs.key, s, g * dim()); };
  const auto values_of_head = [&](Index g) { return keys_of(inputs.value, s, g * value_dim()); };
  const auto queries_of_head = [&](Index h) { return queries_of(inputs.query, s, h * dim()); };
  const auto out_of_head = [&](Index h) { return queries_of(call.out, s, h * value_dim()); };

  TokenTile<T> query(scratch, dim()), key(scratch, dim()), value(scratch, value_dim()), out(scratch, value_dim());
  T* scores = scratch.take<T>(chunk_tokens * chunk_tokens);
  T* normalizer = scratch.take<T>(chunk_tokens);
  const Writes writes = first_writes(call.out, value_dim(), call.add, maps());
  Lookahead ahead;
  const auto announce = [&](const Chunk& next, Index g) {
    ahead.clear();
    values_of_head(g).from(next.key).announce(ahead, next.keys, value_dim());
    keys_of_head(g).from(next.key).announce(ahead, next.keys, dim());
    if (step.sums_only) return;
    queries_of_head(g * heads.group()).from(next.query).announce(ahead, next.queries, heads.group() * dim());
    if (writes == Writes::past_caches) return;
    out_of_head(g * heads.group()).from(next.query).announce(ahead, next.queries, heads.group() * value_dim());
  };
  step.for_each_chunk(announce, [&](const Chunk& chunk, Index g) {
    const Pace fetch{ahead, ahead.pace(inner_steps(chunk, step.sums_only ? 0 : heads.group()))};
    value.load(values_of_head(g).from(chunk.key), chunk.keys, visible.from(chunk.key));
    for (Index r = 0; r < maps(); ++r) {
      const RunningSums<T> state = step.sums_from(((g - step.heads.first) * maps() + r) * map_size(), chunk);
      const RunningSums<T> key_sum = state.from(state_size());
      key.load(keys_of_head(g).from(chunk.key), chunk.keys, visible.from(chunk.key), map(r), normalize_features);
      for (Index h = g * heads.group(); h < (g + 1) * heads.group() && !step.sums_only; ++h) {
        query.load(queries_of_head(h).from(chunk.query), chunk.queries, {}, map(r), normalize_features);
        dot_rows(query, {key_sum.running, dim(), 0}, chunk.queries, normalizer);
        attend_chunk<T>(query, chunk.queries, state.running, key, value, chunk.keys, scores, normalizer, out, false,
                        fetch);
        invert(normalizer, chunk.queries, s.key_count);
        for (Index i = 0; i < chunk.queries && call.inverse_normalizer != nullptr; ++i) {
          (*call.inverse_normalizer)(s.query_begin + chunk.query + i, r * heads.query + h) = normalizer[i];
        }
        out.store(out_of_head(h).from(chunk.query), chunk.queries, normalizer,
                  call.weights.rows() == 0 ? nullptr : call.weights.row(r * heads.query + h),
                  r == 0 ? writes : Writes::added);
      }
      state.add_products(key, value, chunk.keys, fetch);
      key_sum.add_rows(key, nullptr, chunk.keys);
    }
  });
  if (writes == Writes::past_caches) order_stores();
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
