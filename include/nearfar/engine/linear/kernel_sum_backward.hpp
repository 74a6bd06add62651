#pragma once

#include <nearfar/engine/linear/kernel_sum.hpp>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// The backward pass of KernelSum: a scan along the keys for the gradient of queries, and one from the last token to the
// first for the gradients of keys and values. kernel_sum.hpp has the equations.

template <class T>
void KernelSum<T>::backward(const Backward& call, Work& work) const {
  const Inputs<T>& inputs = call.inputs;
  const Index sequences = sequence_count(inputs);
  const Index rows = inputs.query.rows();
  const Index cols = maps() * heads.query;
  const Tokens<T> grad_row_sum = take_rows<T>(work, rows, cols);
  const auto zero = [](Index size) {
    return [size](Index, Range block, const CarriedSums<T>& room) { return room.clear(block.count() * size); };
  };
  const auto along_keys = [&](Index b) { return queries_along_keys(inputs, b, false); };
  for (Index b = 0; b < sequences && !call.add; ++b) {
    call.grad.query.middle_rows(sequence(inputs, b).query_begin, along_keys(b).first_query).matrix().setZero();
  }
  scan<T>(
      work, sequences, heads.key_value, maps() * transposed_map_size(), along_keys,
      zero(maps() * transposed_map_size()),
      [&](const ScanStep<T>& step, Scratch& scratch) { query_gradient_segment(call, grad_row_sum, step, scratch); },
      [](Index, Range, const T*) {});

  // The gradients of the weights are summed within each sequence along with the states, and then over the sequences.
  const Index weights = call.grad_weights.rows() == 0 ? 0 : cols * value_dim();
  T* partial = work.take<T>(sequences * weights);
  scan<T>(
      work, sequences, heads.key_value, weighted_sums_size(), [&](Index b) { return keys_along_queries(inputs, b); },
      zero(weighted_sums_size()),
      [&](const ScanStep<T>& step, Scratch& scratch) { key_gradient_segment(call, grad_row_sum, step, scratch); },
      [&](Index b, Range block, const T* total) {
        for (Index h = block.first * heads.group(); h < block.end * heads.group() && weights > 0; ++h) {
          for (Index r = 0; r < maps(); ++r, total += weighted_map_size()) {
            std::copy_n(total + weighted_map_size() - padded_value_dim(), value_dim(),
                        partial + b * weights + (r * heads.query + h) * value_dim());
          }
        }
      });
  for (Index b = 0; b < sequences && weights > 0; ++b) {
    call.grad_weights.matrix() += Eigen::Map<const Matrix<T>>(partial + b * weights, cols, value_dim());
  }
}

template <class T>
void KernelSum<T>::query_gradient_segment(const Backward& call, Tokens<T> grad_row_sum, const ScanStep<T>& step,
                                          Scratch& scratch) const {
  const Inputs<T>& inputs = call.inputs;
  const Sequence s = sequence(inputs, step.sequence);
  const VisibleKeys visible(inputs, s, false);
  const auto keys_of_head = [&](Index g) { return keys_of(inputs.key, s, g * dim()); };
  const auto values_of_head = [&](Index g) { return keys_of(inputs.value, s, g * value_dim()); };
  const auto queries_of_head = [&](Index h) { return queries_of(inputs.query, s, h * dim()); };
  const auto grad_out_of_head = [&](Index h) { return queries_of(call.grad_out, s, h * value_dim()); };
  const auto grad_query_of_head = [&](Index h) { return queries_of(call.grad.query, s, h * dim()); };

  TokenTile<T> query(scratch, dim()), key(scratch, dim()), value(scratch, value_dim());
  TokenTile<T> grad_out(scratch, value_dim()), grad_query(scratch, dim());
  T* scores = scratch.take<T>(chunk_tokens * chunk_tokens);
  T* key_prefix = scratch.take<T>(padded_dim());
  T* row_sum = scratch.take<T>(chunk_tokens);
  const Writes writes = first_writes(call.grad.query, dim(), call.add, maps());
  Lookahead ahead;
  const auto announce = [&](const Chunk& next, Index g) {
    ahead.clear();
    values_of_head(g).from(next.key).announce(ahead, next.keys, value_dim());
    keys_of_head(g).from(next.key).announce(ahead, next.keys, dim());
    if (step.sums_only) return;
    queries_of_head(g * heads.group()).from(next.query).announce(ahead, next.queries, heads.group() * dim());
    grad_out_of_head(g * heads.group()).from(next.query).announce(ahead, next.queries, heads.group() * value_dim());
    if (writes == Writes::past_caches) return;
    grad_query_of_head(g * heads.group()).from(next.query).announce(ahead, next.queries, heads.group() * dim());
  };
  step.for_each_chunk(announce, [&](const Chunk& chunk, Index g) {
    const Pace fetch{ahead, ahead.pace(inner_steps(chunk, step.sums_only ? 0 : heads.group()))};
    const Index first = s.query_begin + chunk.query;
    value.load(values_of_head(g).from(chunk.key), chunk.keys, visible.from(chunk.key));
    for (Index r = 0; r < maps(); ++r) {
      const RunningSums<T> state = step.sums_from(((g - step.heads.first) * maps() + r) * transposed_map_size(), chunk);
      const RunningSums<T> key_sum = state.from(transposed_state_size());
      key.load(keys_of_head(g).from(chunk.key), chunk.keys, visible.from(chunk.key), map(r), normalize_features);
      for (Index h = g * heads.group(); h < (g + 1) * heads.group() && !step.sums_only; ++h) {
        const Index normalizer = r * heads.query + h;
        query.load(queries_of_head(h).from(chunk.query), chunk.queries, {}, map(r), normalize_features);
        grad_out.load(grad_out_of_head(h).from(chunk.query), chunk.queries);
        for (Index i = 0; i < chunk.queries; ++i) {
          grad_out.entries(i) *= call.inverse_normalizer(first + i, normalizer);
          if (call.weights.rows() > 0) grad_out.entries(i) *= weight(call.weights, r, h);
        }
        attend_chunk<T>(grad_out, chunk.queries, state.running, value, key, chunk.keys, scores, nullptr, grad_query,
                        false, fetch);
        if (eps) {
          dot_rows(query, grad_query, chunk.queries, row_sum);
          for (Index i = 0; i < chunk.queries; ++i) {
            row_sum[i] *= -call.inverse_normalizer(first + i, normalizer);
            grad_row_sum(first + i, normalizer) = row_sum[i];
          }
          std::copy_n(key_sum.running, key.stride, key_prefix);
          chunk_add_prefix_sums<T>(key_prefix, key, nullptr, chunk.keys, row_sum, grad_query, chunk.queries);
        }
        query.chain(queries_of_head(h).from(chunk.query), chunk.queries, map(r), normalize_features, grad_query);
        grad_query.store(grad_query_of_head(h).from(chunk.query), chunk.queries, nullptr, nullptr,
                         r == 0 ? writes : Writes::added);
      }
      state.add_products(value, key, chunk.keys, fetch);
      key_sum.add_rows(key, nullptr, chunk.keys);
    }
  });
  if (writes == Writes::past_caches) order_stores();
}

template <class T>
void KernelSum<T>::key_gradient_segment(const Backward& call, Tokens<T> grad_row_sum, const ScanStep<T>& step,
                                        Scratch& scratch) const {
  const Inputs<T>& inputs = call.inputs;
  const Sequence s = sequence(inputs, step.sequence);
  const VisibleKeys visible(inputs, s, true);
  const auto keys_of_head = [&](Index g) { return keys_of(inputs.key, s, g * dim(), true); };
  const auto values_of_head = [&](Index g) { return keys_of(inputs.value, s, g * value_dim(), true); };
  const auto queries_of_head = [&](Index h) { return queries_of(inputs.query, s, h * dim(), true); };
  const auto grad_out_of_head = [&](Index h) { return queries_of(call.grad_out, s, h * value_dim(), true); };
  const auto grad_key_of_head = [&](Index g) { return keys_of(call.grad.key, s, g * dim(), true); };
  const auto grad_value_of_head = [&](Index g) { return keys_of(call.grad.value, s, g * value_dim(), true); };

  TokenTile<T> query(scratch, dim()), key(scratch, dim()), value(scratch, value_dim()), grad_out(scratch, value_dim());
  TokenTile<T> grad_key(scratch, dim()), grad_value(scratch, value_dim()), of_head(scratch, value_dim());
  T* scores = scratch.take<T>(chunk_tokens * chunk_tokens);
  T* state_transposed = scratch.take<T>(value_dim() * query.stride);
  T* query_prefix = scratch.take<T>(query.stride);
  T* row_sum = scratch.take<T>(chunk_tokens);
  std::fill_n(state_transposed, value_dim() * query.stride, T(0));
  const Writes key_writes = first_writes(call.grad.key, dim(), call.add, maps());
  const Writes value_writes = first_writes(call.grad.value, value_dim(), call.add, 1);
  Lookahead ahead;
  // In this scan keys take the part of queries and queries that of keys.
  const auto announce = [&](const Chunk& next, Index g) {
    ahead.clear();
    queries_of_head(g * heads.group()).from(next.key).announce(ahead, next.keys, heads.group() * dim());
    grad_out_of_head(g * heads.group()).from(next.key).announce(ahead, next.keys, heads.group() * value_dim());
    if (step.sums_only) return;
    values_of_head(g).from(next.query).announce(ahead, next.queries, value_dim());
    keys_of_head(g).from(next.query).announce(ahead, next.queries, dim());
    if (key_writes != Writes::past_caches) grad_key_of_head(g).from(next.query).announce(ahead, next.queries, dim());
    if (value_writes == Writes::past_caches) return;
    grad_value_of_head(g).from(next.query).announce(ahead, next.queries, value_dim());
  };
  step.for_each_chunk(announce, [&](const Chunk& chunk, Index g) {
    const Pace fetch{ahead, ahead.pace(heads.group() * inner_steps(chunk, step.sums_only ? 0 : 2))};
    const Index keys = chunk.queries;
    const Index queries = chunk.keys;
    const Index last_query = s.query_begin + s.query_count - 1 - chunk.key;
    const VisibleKeys shown = visible.from(chunk.query);
    const bool weighted = call.weights.rows() > 0;
    value.load(values_of_head(g).from(chunk.query), keys, shown);
    for (Index r = 0; r < maps(); ++r) {
      key.load(keys_of_head(g).from(chunk.query), keys, shown, map(r), normalize_features);
      for (Index h = g * heads.group(); h < (g + 1) * heads.group(); ++h) {
        const Index place = (h - step.heads.first * heads.group()) * maps() + r;
        const RunningSums<T> state = step.sums_from(place * weighted_map_size(), chunk);
        const RunningSums<T> query_sum = state.from(state_size());
        const RunningSums<T> weight_sum = state.from(map_size());
        query.load(queries_of_head(h).from(chunk.key), queries, {}, map(r), normalize_features);
        grad_out.load(grad_out_of_head(h).from(chunk.key), queries);
        for (Index i = 0; i < queries; ++i) {
          grad_out.entries(i) *= call.inverse_normalizer(last_query - i, r * heads.query + h);
          row_sum[i] = eps ? grad_row_sum(last_query - i, r * heads.query + h) : T(0);
        }
        if (!step.sums_only) {
          const bool first_head = h == g * heads.group(), first = first_head && r == 0;
          for (Index j = 0; j < keys && weighted; ++j) {
            of_head.entries(j) = weight(call.weights, r, h) * value.entries(j);
          }
          TokenTile<T>& values = weighted ? of_head : value;
          transpose(state.running, value.stride, dim(), value_dim(), T(1), state_transposed, query.stride);
          attend_chunk<T>(values, keys, state_transposed, grad_out, query, queries, scores, nullptr, grad_key,
                          !first_head, fetch);
          std::copy_n(query_sum.running, query.stride, query_prefix);
          chunk_add_prefix_sums<T>(query_prefix, query, row_sum, queries, nullptr, grad_key, keys);

          const auto find_grad_value = [&](const TokenTile<T>& to, bool add) {
            attend_chunk<T>(key, keys, state.running, query, grad_out, queries, scores, nullptr, to, add, fetch);
          };
          if (!weighted) {
            find_grad_value(grad_value, !first);
          } else {
            find_grad_value(of_head, false);
            if (first) grad_value.clear();
            for (Index j = 0; j < keys; ++j) {
              grad_value.entries(j) += weight(call.weights, r, h) * of_head.entries(j);
              of_head.entries(j) *= value.entries(j);
            }
            weight_sum.add_rows(of_head, nullptr, keys);
          }
        }
        state.add_products(query, grad_out, queries, fetch);
        query_sum.add_rows(query, row_sum, queries);
      }
      if (step.sums_only) continue;
      key.chain(keys_of_head(g).from(chunk.query), keys, map(r), normalize_features, grad_key);
      grad_key.hide(keys, shown);
      grad_key.store(grad_key_of_head(g).from(chunk.query), keys, nullptr, nullptr,
                     r == 0 ? key_writes : Writes::added);
    }
    if (step.sums_only) return;
    grad_value.hide(keys, shown);
    grad_value.store(grad_value_of_head(g).from(chunk.query), keys, nullptr, nullptr, value_writes);
  });
  if (key_writes == Writes::past_caches || value_writes == Writes::past_caches) order_stores();
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
