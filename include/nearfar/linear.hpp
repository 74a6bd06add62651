#pragma once

#include <nearfar/checks.hpp>
#include <nearfar/engine/linear/kernel_sum_backward.hpp>
#include <nearfar/feature_map.hpp>

#include <cmath>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

/// What the weighted sum of values is divided by.
enum class Normalizer { row_sum, sqrt_length };

struct LinearOptions {
  /// At least one; the result is the sum over them of each map's own attention.
  std::vector<AnyFeatureMap> feature_maps = {feature_map::Elu{}};
  bool causal = false;
  Normalizer normalizer = Normalizer::row_sum;
  /// Added to the row sum; 0 or more.
  double eps = 1e-6;
  /// Divides the features of each query and key, a head, by their sum.
  bool normalize_features = false;
};

namespace detail {

inline void check_linear(std::string_view mechanism, std::span<const AnyFeatureMap> maps, double eps) {
  require(!maps.empty(), mechanism, "feature_maps must hold at least one map, but holds 0.");
  require(eps >= 0 && std::isfinite(eps), mechanism, "eps must be finite and 0 or more, but is ", eps, ".");
}

inline void check_linear_stream(std::string_view mechanism, bool causal, Normalizer normalizer) {
  check_streams(mechanism, causal);
  require(normalizer == Normalizer::row_sum, mechanism,
          "a stream needs normalizer row_sum, but normalizer is sqrt_length.");
}

/// The sum of these options: those of Linear, or of what blends its maps with weights.
template <class T, class Options>
KernelSum<T> kernel_sum(const Heads& heads, const Options& options) {
  return {heads, options.feature_maps, options.causal, options.normalize_features,
          options.normalizer == Normalizer::row_sum ? std::optional(options.eps) : std::nullopt};
}

}  // namespace detail

/// Linear attention: inner products of feature maps take the place of the softmax's exponential, so that the sum over
/// keys can be taken before the query is known.
///
///   out_i = sum_r  phi_r(q_i) S_r / normalizer_ri,    S_r = sum_j phi_r(k_j)^T v_j
///
///   row_sum      normalizer_ri = phi_r(q_i) . sum_j phi_r(k_j) + eps
///   sqrt_length  normalizer    = sqrt(n_k), of all keys of the sequence, also with a key mask or causal
///
/// with j over the keys that query i sees.
/// Shapes: as in attention.hpp; n_q and n_k, and dim and value_dim, may differ; causal is aligned at the end. S_r is
/// dim x value_dim a head, and serves all query heads that share a key/value head.
/// Time: 4 n d d_v flops a query head and map, and causal 2 n 64 d more for the pairs within chunks of about 64 tokens;
/// 6 n d d_v where the longest sequence has more than 2048 tokens and a head of it is more than a thread's share.
/// Memory beside inputs and out: four times S a thread, head and map, whatever n is; in that case twice S for every
/// 2048 tokens or so, four times where not causal. Backward twice as much, of query heads where forward is of key
/// heads, and 2 numbers a query, head and map. A second call of the same shapes and masks allocates nothing. Masked
/// keys are left out of every sum, and a query that sees no key gives a zero row. A map that may be negative can make
/// the row sum vanish: the equation is followed as it stands. With `normalize_features`, features whose sum is zero
/// count as zero.
///
/// Source: Katharopoulos et al. (arXiv 2006.16236), equations 4 to 9; several maps as in FMMformer (arXiv 2108.02347),
/// equation 9; sqrt_length and normalised features as in FMMformer's code.
template <class T>
class Linear {
 public:
  using Scalar = T;
  using Options = LinearOptions;
  using Parameters = NoParameters;

  struct Saved {
    Matrix<T> inverse_normalizer;  ///< n_q x (maps * heads.query); 0 where a query sees no key
  };

  /// What a stream remembers: the sums of each head and map, and whether any key was visible yet.
  struct State : detail::KernelSum<T>::State {
    Index tokens = 0;  ///< seen so far
  };

  explicit Linear(const Heads& heads, const Options& options = {}) : heads_(heads), options_(options) {
    detail::check_heads(name, heads);
    detail::check_linear(name, options.feature_maps, options.eps);
  }

  const Heads& heads() const { return heads_; }
  const Options& options() const { return options_; }
  const Parameters& parameters() const { return parameters_; }
  Parameters& parameters() { return parameters_; }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::any);
    detail::Work work(context);
    sum().forward({.inputs = inputs, .out = out}, work);
  }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Saved& saved, Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::any);
    detail::Work work(context);
    sum().forward({.inputs = inputs, .out = out, .inverse_normalizer = &saved.inverse_normalizer}, work);
  }

  void backward(const Inputs<T>& inputs, Tokens<const T> out, const Saved& saved, Tokens<const T> grad_out,
                const InputGradients<T>& grad_inputs, Parameters&, Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::any);
    detail::check_gradients<T>(name, heads_, inputs, out, grad_out, grad_inputs);
    detail::check_saved(name, "inverse_normalizer", saved.inverse_normalizer, inputs.query.rows(),
                        sum().maps() * heads_.query);
    detail::Work work(context);
    sum().backward(
        {.inputs = inputs, .grad_out = grad_out, .inverse_normalizer = saved.inverse_normalizer, .grad = grad_inputs},
        work);
  }

  /// A stream that has seen nothing. The attention must be causal and normalised by row_sum: sqrt_length would change
  /// for the tokens that are done with every token that comes.
  State start() const {
    detail::check_linear_stream(name, options_.causal, options_.normalizer);
    return {sum().start()};
  }

  /// Appends tokens, with as many queries as keys, to a stream and writes their rows of out. O(1) memory in the tokens
  /// seen, one by one as exact as all at once. If a feature map throws, the state is lost.
  void extend(State& state, const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    detail::check_linear_stream(name, options_.causal, options_.normalizer);
    detail::check_stream_inputs<T>(name, heads_, inputs, out);
    sum().check_state(name, state);
    detail::Work work(context);
    sum().forward({.inputs = inputs, .out = out, .state = &state}, work);
    state.tokens += inputs.query.rows();
  }

 private:
  static constexpr std::string_view name = "Linear";

  detail::KernelSum<T> sum() const { return detail::kernel_sum<T>(heads_, options_); }

  Heads heads_;
  Options options_;
  [[no_unique_address]] Parameters parameters_;
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
