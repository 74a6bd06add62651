#pragma once

#include <nearfar/engine/softmax/window_mechanism.hpp>

#include <optional>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

struct BandedOptions {
  /// How far a query sees to either side, both ends inclusive. Unlimited unless given: then it is Softmax.
  Window window = {};
  /// Hides the keys to the right, however many window.right shows.
  bool causal = false;
  /// What query . key is multiplied by; 1 / sqrt(dim) unless given.
  std::optional<double> scale = {};
};

/// Near-field attention: softmax over the keys within a window around the query.
///
///   out_i = sum_j softmax_j(scale * q_i . k_j) v_j      over i - left <= j <= i + right, for each head
///
/// Shapes as Softmax. Where n_q and n_k differ the window is aligned with the end of the keys: query i stands at key
/// position i + n_k - n_q.
/// Time: 2 n_q w (dim + value_dim) flops a head for windows of w = left + right + 1 keys. Memory beside
/// inputs and out: a tile a thread, whatever n and w; backward as Softmax, but of each segment of the keys only the
/// queries that see it. A second call of the same shapes allocates nothing.
/// Masked keys are never read. A query that sees no key gets a zero row and log-sum-exp -infinity.
/// Streams (causal, or window.right 0) remember the last window.left keys and values, however many tokens have come.
/// Source: Nguyen et al., FMMformer, arXiv 2108.02347: its banded near-field matrix, here never formed. Its code's
/// "band b" is the window {b - 1, b - 1}.
template <class T>
class Banded : public detail::WindowMechanism<T, BandedOptions> {
 public:
  explicit Banded(const Heads& heads, const BandedOptions& options = {})
      : detail::WindowMechanism<T, BandedOptions>("Banded", heads, options, options.window) {}
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
