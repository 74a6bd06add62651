#pragma once

#include <nearfar/engine/softmax/window_mechanism.hpp>

#include <optional>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

struct SoftmaxOptions {
  bool causal = false;
  /// What query . key is multiplied by; 1 / sqrt(dim) unless given.
  std::optional<double> scale = {};
};

/// Exact softmax attention: the baseline.
///
///   out_i = sum_j softmax_j(scale * q_i . k_j) v_j      over the keys j that query i sees, for each head
///
/// Shapes: query n_q x (heads.query * dim), key n_k x (heads.key_value * dim), value n_k x (heads.key_value *
/// value_dim), out n_q x (heads.query * value_dim); n_q and n_k may differ, and causal queries are aligned with the end
/// of the keys: query i sees j <= i + n_k - n_q.
///
/// Time: 2 n_q n_k (dim + value_dim) flops a head, half of it when causal. Memory beside inputs and out: a tile a
/// thread, whatever n (up to 6 queries a sequence: a row of out each for every 1024 keys). Backward: a number a query
/// and head, and where sequences and key heads are few a gradient of query for each further segment of the keys, at
/// most 15. A second call of the same shapes allocates nothing. Streams (causal) remember all keys and values: a token
/// costs 2 n (dim + value_dim) flops a head, bound by reading these.
///
/// Masked keys are never read. A query that sees no key gets a zero row and log-sum-exp -infinity.
///
/// Source: Vaswani et al., arXiv 1706.03762, equation 1, by the online softmax of arXiv 1805.02867 in tiles as
/// FlashAttention, arXiv 2205.14135.
template <class T>
class Softmax : public detail::WindowMechanism<T, SoftmaxOptions> {
 public:
  explicit Softmax(const Heads& heads, const SoftmaxOptions& options = {})
      : detail::WindowMechanism<T, SoftmaxOptions>("Softmax", heads, options, Window{}) {}
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
