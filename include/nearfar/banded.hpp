#pragma once

#include <nearfar/detail/checks.hpp>
#include <nearfar/engine/window_attention.hpp>
#include <nearfar/engine/window_gradient.hpp>

#include <optional>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

struct BandedOptions {
  /// How far a query sees to either side, both ends inclusive.
  Window window = {};
  /// Hides the keys to the right, whatever window.right says.
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
/// Time: 2 n_q w (dim + value_dim) multiply-adds' flops a head for windows of w = left + right + 1 keys. Memory beside
/// inputs and out: a tile a thread, whatever n and w; a second call of the same shapes allocates nothing.
/// Masked keys are never read. A query that sees no key gets a zero row and log-sum-exp -infinity.
/// Source: Nguyen et al., FMMformer, arXiv 2108.02347, equation 5: the banded matrix D, here never formed. Its code's
/// "band b" is the window {b - 1, b - 1}.
template <class T>
class Banded {
 public:
  using Scalar = T;
  using Options = BandedOptions;
  using Parameters = NoParameters;

  /// log_sum_exp: heads.query x n_q, of the scaled scores that a query sees.
  struct Saved {
    Matrix<T> log_sum_exp;
  };

  explicit Banded(const Heads& heads, const Options& options = {}) : heads_(heads), options_(options) {
    detail::check_heads(name, heads);
    detail::check_scale(name, options.scale);
    detail::check_window(name, options.window);
  }

  const Heads& heads() const { return heads_; }
  const Options& options() const { return options_; }
  const Parameters& parameters() const { return parameters_; }
  Parameters& parameters() { return parameters_; }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::any);
    attend(inputs, out, nullptr, context);
  }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Saved& saved, Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::any);
    saved.log_sum_exp.resize(heads_.query, inputs.query.rows());
    attend(inputs, out, saved.log_sum_exp.data(), context);
  }

  void backward(const Inputs<T>& inputs, Tokens<const T> out, const Saved& saved, Tokens<const T> grad_out,
                const InputGradients<T>& grad_inputs, Parameters&, Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::any);
    detail::check_gradients<T>(name, heads_, inputs, grad_out, grad_inputs);
    detail::check_saved(name, "log_sum_exp", saved.log_sum_exp, heads_.query, inputs.query.rows());
    detail::Work work(context);
    auto* delta = work.take<Accumulator<T>>(heads_.query * inputs.query.rows());
    detail::softmax_delta(work, heads_, out, grad_out, delta);
    detail::window_gradient(work, heads_, window(), detail::scale_or_default(options_.scale, heads_), inputs,
                            saved.log_sum_exp.data(), grad_out, delta, grad_inputs);
  }

 private:
  static constexpr const char* name = "Banded";

  Window window() const { return options_.causal ? options_.window.causal() : options_.window; }

  void attend(const Inputs<T>& inputs, Tokens<T> out, T* log_sum_exp, Context& context) const {
    detail::Work work(context);
    detail::window_attention(work, heads_, window(), detail::scale_or_default(options_.scale, heads_), inputs, out,
                             log_sum_exp);
  }

  Heads heads_;
  Options options_;
  [[no_unique_address]] Parameters parameters_;
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
