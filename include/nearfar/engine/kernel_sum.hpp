#pragma once

#include <nearfar/engine/segmented_scan.hpp>
#include <nearfar/engine/token_tile.hpp>

#include <cmath>
#include <optional>
#include <span>

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

  struct Forward {
    const Inputs<T>& inputs;
    Tokens<T> out;
    std::span<const Matrix<T>> weights = {};  ///< one a map, heads.query x value_dim; empty for 1
    bool add = false;                         ///< whether to add to what stands in out
    Matrix<T>* inverse_normalizer = nullptr;  ///< takes g, n_q x (maps * heads.query), unless null
    T* stream = nullptr;                      ///< the sums to begin with, and then those to go on with, unless null
    bool stream_has_keys = false;
  };

  struct Backward {
    const Inputs<T>& inputs;
    Tokens<const T> grad_out;
    const Matrix<T>& inverse_normalizer;
    InputGradients<T> grad;
    std::span<const Matrix<T>> weights = {};
    std::span<Matrix<T>> grad_weights = {};  ///< one a map, always added to; empty where there are no weights
    bool add = false;                        ///< whether to add to what stands in grad
  };

  void forward(const Forward& call, Work& work) const;
  void backward(const Backward& call, Work& work) const;

  /// Whether any key of the sequence may be seen.
  static Index first_visible_key(const Inputs<T>& inputs, const Sequence& s) {
    const VisibleKeys visible(inputs, s, false);
    Index j = 0;
    while (j < s.key_count && !visible(j)) ++j;
    return j;
  }

 private:
  Index dim() const { return heads.dim; }
  Index value_dim() const { return heads.value_width(); }
  Index padded_dim() const { return round_up(dim(), lanes<T>); }
  Index padded_value_dim() const { return round_up(value_dim(), lanes<T>); }
  Index map_size() const { return dim() * padded_value_dim() + padded_dim(); }
  Index query_gradient_size() const { return maps() * (value_dim() * padded_dim() + padded_dim()); }
  Index gradient_map_size() const { return map_size() + padded_value_dim(); }
  Index key_gradient_size() const { return heads.group() * maps() * gradient_map_size(); }

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

  static auto row_of(const Matrix<T>& weights, Index h) { return weights.row(h).array(); }

  /// One head of the tokens of a sequence.
  template <class S>
  static TokenRows<S> queries_of(Tokens<S> tokens, const Sequence& s, Index col, bool reversed = false) {
    return token_rows(tokens, s.query_begin, s.query_count, col, reversed);
  }
  template <class S>
  static TokenRows<S> keys_of(Tokens<S> tokens, const Sequence& s, Index col, bool reversed = false) {
    return token_rows(tokens, s.key_begin, s.key_count, col, reversed);
  }

  void forward_segment(const Forward& call, const ScanStep<T>& step, Scratch& scratch) const;
  void query_gradient_segment(const Backward& call, Tokens<T> grad_row_sum, const ScanStep<T>& step,
                              Scratch& scratch) const;
  void key_gradient_segment(const Backward& call, Tokens<T> grad_row_sum, const ScanStep<T>& step,
                            Scratch& scratch) const;

  T inverse_of(T row_sum, Index key_count) const {
    return eps ? T(1) / (row_sum + static_cast<T>(*eps)) : T(1) / std::sqrt(static_cast<T>(key_count));
  }
};

template <class T>
void KernelSum<T>::forward(const Forward& call, Work& work) const {
  const Inputs<T>& inputs = call.inputs;
  if (call.inverse_normalizer != nullptr) {
    call.inverse_normalizer->setZero(inputs.query.rows(), maps() * heads.query);
  }
  const auto alignment = [&](Index b) { return queries_along_keys(inputs, b, call.stream_has_keys); };
  for (Index b = 0; b < sequence_count(inputs) && !call.add; ++b) {
    call.out.middle_rows(sequence(inputs, b).query_begin, alignment(b).first_query).matrix().setZero();
  }
  scan<T>(
      work, sequence_count(inputs), heads.key_value, sums_size(), alignment,
      [&](Index, Range block, T* past) {
        const Index count = block.count() * sums_size();
        if (call.stream == nullptr) {
          std::fill_n(past, count, T(0));
        } else {
          std::copy_n(call.stream + block.first * sums_size(), count, past);
        }
      },
      [&](const ScanStep<T>& step, Scratch& scratch) { forward_segment(call, step, scratch); },
      [&](Index, Range block, const T* total) {
        if (call.stream == nullptr) return;
        std::copy_n(total, block.count() * sums_size(), call.stream + block.first * sums_size());
      });
}

template <class T>
void KernelSum<T>::forward_segment(const Forward& call, const ScanStep<T>& step, Scratch& scratch) const {
  const Inputs<T>& inputs = call.inputs;
  const Sequence s = sequence(inputs, step.sequence);
  const VisibleKeys visible(inputs, s, false);
  TokenTile<T> query(scratch, dim()), key(scratch, dim()), value(scratch, value_dim()), out(scratch, value_dim());
  T* query_lanes = scratch.take<T>(dim() * chunk_tokens);
  T* scores = scratch.take<T>(chunk_tokens * chunk_tokens);
  T* normalizer = scratch.take<T>(chunk_tokens);
  for_each_chunk(step.segment, [&](const Chunk& chunk) {
    for (Index g = step.heads.first; g < step.heads.end; ++g) {
      value.load(keys_of(inputs.value, s, g * value_dim()).from(chunk.key), chunk.keys, visible.from(chunk.key));
      for (Index r = 0; r < maps(); ++r) {
        const RunningSums<T> state = step.sums.from(((g - step.heads.first) * maps() + r) * map_size());
        const RunningSums<T> key_sum = state.from(dim() * value.stride());
        key.load(keys_of(inputs.key, s, g * dim()).from(chunk.key), chunk.keys, visible.from(chunk.key), map(r),
                 normalize_features);
        for (Index h = g * heads.group(); h < (g + 1) * heads.group() && !step.sums_only; ++h) {
          query.load(queries_of(inputs.query, s, h * dim()).from(chunk.query), chunk.queries, {}, map(r),
                     normalize_features);
          query.transpose_into(query_lanes, chunk.queries);
          past_row_sums(query_lanes, chunk.queries, key_sum.running, dim(), normalizer);
          chunk_scores(query_lanes, chunk.queries, key.data(), key.stride(), chunk.keys, dim(), scores, normalizer);
          out.clear();
          chunk_attend(query_lanes, chunk.queries, dim(), state.running, scores, value.data(), chunk.keys, out.data(),
                       out.stride());
          for (Index i = 0; i < chunk.queries; ++i) {
            const T inverse = inverse_of(normalizer[i], s.key_count);
            out.row(i) *= inverse;
            if (!call.weights.empty()) out.row(i) *= row_of(call.weights[static_cast<std::size_t>(r)], h);
            if (call.inverse_normalizer != nullptr) {
              (*call.inverse_normalizer)(s.query_begin + chunk.query + i, r * heads.query + h) = inverse;
            }
          }
          out.store(queries_of(call.out, s, h * value_dim()).from(chunk.query), chunk.queries, call.add || r > 0);
        }
        state.add_products(key.data(), key.stride(), dim(), value.data(), value.stride(), chunk.keys);
        key_sum.add_rows(key.data(), key.stride(), nullptr, chunk.keys);
      }
    }
  });
}

template <class T>
void KernelSum<T>::backward(const Backward& call, Work& work) const {
  const Inputs<T>& inputs = call.inputs;
  const Index sequences = sequence_count(inputs);
  const Index rows = inputs.query.rows();
  const Index cols = maps() * heads.query;
  const Tokens<T> grad_row_sum(work.take<T>(rows * cols), rows, cols, cols);
  const auto zero = [](Index size) {
    return [size](Index, Range block, T* past) { std::fill_n(past, block.count() * size, T(0)); };
  };
  const auto along_keys = [&](Index b) { return queries_along_keys(inputs, b, false); };
  for (Index b = 0; b < sequences && !call.add; ++b) {
    call.grad.query.middle_rows(sequence(inputs, b).query_begin, along_keys(b).first_query).matrix().setZero();
  }
  scan<T>(
      work, sequences, heads.key_value, query_gradient_size(), along_keys, zero(query_gradient_size()),
      [&](const ScanStep<T>& step, Scratch& scratch) { query_gradient_segment(call, grad_row_sum, step, scratch); },
      [](Index, Range, const T*) {});

  // The gradients of the weights are summed within each sequence along with the states, and then over the sequences.
  const Index weights = call.grad_weights.empty() ? 0 : cols * value_dim();
  T* partial = work.take<T>(sequences * weights);
  scan<T>(
      work, sequences, heads.key_value, key_gradient_size(), [&](Index b) { return keys_along_queries(inputs, b); },
      zero(key_gradient_size()),
      [&](const ScanStep<T>& step, Scratch& scratch) { key_gradient_segment(call, grad_row_sum, step, scratch); },
      [&](Index b, Range block, const T* total) {
        for (Index h = block.first * heads.group(); h < block.end * heads.group() && weights > 0; ++h) {
          for (Index r = 0; r < maps(); ++r, total += gradient_map_size()) {
            std::copy_n(total + gradient_map_size() - padded_value_dim(), value_dim(),
                        partial + b * weights + (r * heads.query + h) * value_dim());
          }
        }
      });
  for (Index b = 0; b < sequences && weights > 0; ++b) {
    for (Index r = 0; r < maps(); ++r) {
      call.grad_weights[static_cast<std::size_t>(r)] +=
          Eigen::Map<const Matrix<T>>(partial + b * weights + r * heads.query * value_dim(), heads.query, value_dim());
    }
  }
}

template <class T>
void KernelSum<T>::query_gradient_segment(const Backward& call, Tokens<T> grad_row_sum, const ScanStep<T>& step,
                                          Scratch& scratch) const {
  const Inputs<T>& inputs = call.inputs;
  const Sequence s = sequence(inputs, step.sequence);
  const VisibleKeys visible(inputs, s, false);
  TokenTile<T> query(scratch, dim()), key(scratch, dim()), value(scratch, value_dim());
  TokenTile<T> grad_out(scratch, value_dim()), grad_query(scratch, dim());
  T* grad_out_lanes = scratch.take<T>(value_dim() * chunk_tokens);
  T* scores = scratch.take<T>(chunk_tokens * chunk_tokens);
  T* key_prefix = scratch.take<T>(padded_dim());
  T* row_sum_gradient = scratch.take<T>(chunk_tokens);
  for_each_chunk(step.segment, [&](const Chunk& chunk) {
    const Index first = s.query_begin + chunk.query;
    for (Index g = step.heads.first; g < step.heads.end; ++g) {
      value.load(keys_of(inputs.value, s, g * value_dim()).from(chunk.key), chunk.keys, visible.from(chunk.key));
      for (Index r = 0; r < maps(); ++r) {
        const RunningSums<T> state =
            step.sums.from(((g - step.heads.first) * maps() + r) * (query_gradient_size() / maps()));
        const RunningSums<T> key_sum = state.from(value_dim() * padded_dim());
        key.load(keys_of(inputs.key, s, g * dim()).from(chunk.key), chunk.keys, visible.from(chunk.key), map(r),
                 normalize_features);
        for (Index h = g * heads.group(); h < (g + 1) * heads.group() && !step.sums_only; ++h) {
          const Rows queries = queries_of(inputs.query, s, h * dim()).from(chunk.query);
          query.load(queries, chunk.queries, {}, map(r), normalize_features);
          grad_out.load(queries_of(call.grad_out, s, h * value_dim()).from(chunk.query), chunk.queries);
          for (Index i = 0; i < chunk.queries; ++i) {
            grad_out.row(i) *= call.inverse_normalizer(first + i, r * heads.query + h);
            if (!call.weights.empty()) grad_out.row(i) *= row_of(call.weights[static_cast<std::size_t>(r)], h);
          }
          grad_out.transpose_into(grad_out_lanes, chunk.queries);
          chunk_scores<T>(grad_out_lanes, chunk.queries, value.data(), value.stride(), chunk.keys, value_dim(), scores,
                          nullptr);
          grad_query.clear();
          chunk_attend(grad_out_lanes, chunk.queries, value_dim(), state.running, scores, key.data(), chunk.keys,
                       grad_query.data(), grad_query.stride());
          if (eps) {
            for (Index i = 0; i < chunk.queries; ++i) {
              row_sum_gradient[i] =
                  -call.inverse_normalizer(first + i, r * heads.query + h) * (query.row(i) * grad_query.row(i)).sum();
              grad_row_sum(first + i, r * heads.query + h) = row_sum_gradient[i];
            }
            std::copy_n(key_sum.running, padded_dim(), key_prefix);
            chunk_add_prefix_sums<T>(key_prefix, key.data(), nullptr, chunk.keys, row_sum_gradient, chunk.queries,
                                     grad_query.data(), grad_query.stride());
          }
          query.chain(queries, chunk.queries, map(r), normalize_features, grad_query);
          grad_query.store(queries_of(call.grad.query, s, h * dim()).from(chunk.query), chunk.queries,
                           call.add || r > 0);
        }
        state.add_products(value.data(), value.stride(), value_dim(), key.data(), key.stride(), chunk.keys);
        key_sum.add_rows(key.data(), key.stride(), nullptr, chunk.keys);
      }
    }
  });
}

template <class T>
void KernelSum<T>::key_gradient_segment(const Backward& call, Tokens<T> grad_row_sum, const ScanStep<T>& step,
                                        Scratch& scratch) const {
  const Inputs<T>& inputs = call.inputs;
  const Sequence s = sequence(inputs, step.sequence);
  // From the last token to the first: keys take the part of queries, and queries that of keys.
  const VisibleKeys visible(inputs, s, true);
  TokenTile<T> query(scratch, dim()), key(scratch, dim()), value(scratch, value_dim()), grad_out(scratch, value_dim());
  TokenTile<T> grad_key(scratch, dim()), grad_value(scratch, value_dim()), weighted(scratch, value_dim());
  T* key_lanes = scratch.take<T>(dim() * chunk_tokens);
  T* value_lanes = scratch.take<T>(value_dim() * chunk_tokens);
  T* scores = scratch.take<T>(chunk_tokens * chunk_tokens);
  T* state_transposed = scratch.take<T>(value_dim() * padded_dim());
  T* query_prefix = scratch.take<T>(padded_dim());
  T* row_sum_gradient = scratch.take<T>(chunk_tokens);
  std::fill_n(state_transposed, value_dim() * padded_dim(), T(0));
  for_each_chunk(step.segment, [&](const Chunk& chunk) {
    // In the roles of this pass chunk.query counts keys and chunk.key queries.
    const Index keys = chunk.queries;
    const Index queries = chunk.keys;
    const Index last = s.query_begin + s.query_count - 1 - chunk.key;
    const VisibleKeys shown = visible.from(chunk.query);
    for (Index g = step.heads.first; g < step.heads.end; ++g) {
      const Rows key_rows = keys_of(inputs.key, s, g * dim(), true).from(chunk.query);
      value.load(keys_of(inputs.value, s, g * value_dim(), true).from(chunk.query), keys, shown);
      grad_value.clear();
      for (Index r = 0; r < maps(); ++r) {
        key.load(key_rows, keys, shown, map(r), normalize_features);
        key.transpose_into(key_lanes, keys);
        grad_key.clear();
        for (Index h = g * heads.group(); h < (g + 1) * heads.group(); ++h) {
          const RunningSums<T> state =
              step.sums.from(((h - step.heads.first * heads.group()) * maps() + r) * gradient_map_size());
          const RunningSums<T> query_sum = state.from(map_size() - padded_dim());
          query.load(queries_of(inputs.query, s, h * dim(), true).from(chunk.key), queries, {}, map(r),
                     normalize_features);
          grad_out.load(queries_of(call.grad_out, s, h * value_dim(), true).from(chunk.key), queries);
          for (Index i = 0; i < queries; ++i) {
            grad_out.row(i) *= call.inverse_normalizer(last - i, r * heads.query + h);
            row_sum_gradient[i] = eps ? grad_row_sum(last - i, r * heads.query + h) : T(0);
          }
          if (!step.sums_only) {
            value.transpose_into(value_lanes, keys);
            if (!call.weights.empty()) {
              const auto weight = row_of(call.weights[static_cast<std::size_t>(r)], h);
              for (Index c = 0; c < value_dim(); ++c) {
                Eigen::Map<Eigen::Array<T, chunk_tokens, 1>>(value_lanes + c * chunk_tokens) *= weight(c);
              }
            }
            chunk_scores<T>(value_lanes, keys, grad_out.data(), grad_out.stride(), queries, value_dim(), scores,
                            nullptr);
            transpose(state.running, padded_value_dim(), dim(), value_dim(), T(1), state_transposed, padded_dim());
            chunk_attend(value_lanes, keys, value_dim(), state_transposed, scores, query.data(), queries,
                         grad_key.data(), grad_key.stride());
            if (eps) {
              std::copy_n(query_sum.running, padded_dim(), query_prefix);
              chunk_add_prefix_sums<T>(query_prefix, query.data(), row_sum_gradient, queries, nullptr, keys,
                                       grad_key.data(), grad_key.stride());
            }
            chunk_scores<T>(key_lanes, keys, query.data(), query.stride(), queries, dim(), scores, nullptr);
            weighted.clear();
            chunk_attend(key_lanes, keys, dim(), state.running, scores, grad_out.data(), queries, weighted.data(),
                         weighted.stride());
            weighted.hide(keys, shown);
            for (Index j = 0; j < keys; ++j) {
              if (call.weights.empty()) {
                grad_value.row(j) += weighted.row(j);
              } else {
                grad_value.row(j) += row_of(call.weights[static_cast<std::size_t>(r)], h) * weighted.row(j);
                weighted.row(j) *= value.row(j);
              }
            }
            if (!call.weights.empty()) {
              state.from(map_size()).add_rows(weighted.data(), weighted.stride(), nullptr, keys);
            }
          }
          state.add_products(query.data(), query.stride(), dim(), grad_out.data(), grad_out.stride(), queries);
          query_sum.add_rows(query.data(), query.stride(), row_sum_gradient, queries);
        }
        if (step.sums_only) continue;
        key.chain(key_rows, keys, map(r), normalize_features, grad_key);
        grad_key.hide(keys, shown);
        grad_key.store(keys_of(call.grad.key, s, g * dim(), true).from(chunk.query), keys, call.add || r > 0);
      }
      if (step.sums_only) continue;
      grad_value.store(keys_of(call.grad.value, s, g * value_dim(), true).from(chunk.query), keys, call.add);
    }
  });
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
