#pragma once

#include <nearfar/detail/checks.hpp>
#include <nearfar/engine/window_attention.hpp>
#include <nearfar/engine/window_gradient.hpp>

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
/// of the keys: query i sees j <= i + n_k - n_q. Time: 2 n_q n_k (dim + value_dim) multiply-adds' flops a head, half of
/// it when causal. Memory beside inputs and out: a tile a thread, whatever n; a second call of the same shapes
/// allocates nothing. Masked keys are never read. A query that sees no key gets a zero row and log-sum-exp -infinity.
/// Source: Vaswani et al., arXiv 1706.03762, equation 1, by the online softmax of arXiv 1805.02867 in tiles as
/// FlashAttention, arXiv 2205.14135.
template <class T>
class Softmax {
 public:
  using Scalar = T;
  using Options = SoftmaxOptions;
  using Parameters = NoParameters;

  /// log_sum_exp: heads.query x n_q, of the scaled scores that a query sees.
  struct Saved {
    Matrix<T> log_sum_exp;
  };

  explicit Softmax(const Heads& heads, const Options& options = {}) : heads_(heads), options_(options) {
    detail::check_heads(name, heads);
    detail::check_scale(name, options.scale);
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
  static constexpr const char* name = "Softmax";

  Window window() const { return options_.causal ? Window{}.causal() : Window{}; }

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
