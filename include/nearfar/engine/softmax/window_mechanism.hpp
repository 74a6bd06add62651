#pragma once

#include <nearfar/checks.hpp>
#include <nearfar/engine/softmax/key_value_cache.hpp>
#include <nearfar/engine/softmax/window_attention.hpp>
#include <nearfar/engine/softmax/window_backward.hpp>

#include <algorithm>
#include <string_view>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// What Softmax and Banded have in common: all but their options and the window that these stand for.
template <class T, class MechanismOptions>
class WindowMechanism {
 public:
  using Scalar = T;
  using Options = MechanismOptions;
  using Parameters = NoParameters;

  /// log_sum_exp: heads.query x n_q, of the scaled scores that a query sees.
  struct Saved {
    Matrix<double> log_sum_exp;
  };

  /// What a stream remembers: keys, values and mask of the tokens that later queries see, which are all tokens, or the
  /// last window.left, in room for up to three times as many.
  struct State : KeyValueCache<T> {
    Index tokens = 0;  ///< seen so far
  };

  const Heads& heads() const { return heads_; }
  const Options& options() const { return options_; }
  const Parameters& parameters() const { return parameters_; }
  Parameters& parameters() { return parameters_; }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    check_inputs<T>(name_, heads_, inputs, out, Lengths::any);
    attend(inputs, out, nullptr, context);
  }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Saved& saved, Context& context = default_context()) const {
    check_inputs<T>(name_, heads_, inputs, out, Lengths::any);
    saved.log_sum_exp.resize(heads_.query, inputs.query.rows());
    attend(inputs, out, saved.log_sum_exp.data(), context);
  }

  void backward(const Inputs<T>& inputs, Tokens<const T> out, const Saved& saved, Tokens<const T> grad_out,
                const InputGradients<T>& grad_inputs, Parameters&, Context& context = default_context()) const {
    run_backward(inputs, out, saved, grad_out, {}, grad_inputs, context);
  }

  /// The same where the loss depends on saved.log_sum_exp too, as after `merge`: with its gradient, heads.query x n_q.
  void backward(const Inputs<T>& inputs, Tokens<const T> out, const Saved& saved, Tokens<const T> grad_out,
                Tokens<const double> grad_log_sum_exp, const InputGradients<T>& grad_inputs, Parameters&,
                Context& context = default_context()) const {
    check_head_rows(name_, "grad_log_sum_exp", grad_log_sum_exp, heads_.query, inputs.query.rows());
    run_backward(inputs, out, saved, grad_out, grad_log_sum_exp, grad_inputs, context);
  }

  /// A stream that has seen nothing. No query may see later keys: the attention must be causal, or window.right 0.
  /// Room for `room` tokens, or for all that a window needs where that is less, is made now, and the state does not
  /// grow while single tokens stay within it; otherwise it grows by doubling. The context's working memory, which is
  /// that of its longest call, grows by itself: by a row of out for every 1024 keys that a token sees.
  State start(Index room = 0) const {
    check_streams();
    return {start_window<T>(name_, heads_, tokens_back(window_), room)};
  }

  /// Appends tokens, with as many queries as keys, to a stream and writes their rows of out. Costs what forward costs
  /// for these queries, and a copy of their keys and values.
  void extend(State& state, const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    check_streams();
    check_stream_inputs<T>(name_, heads_, inputs, out);
    check_cache(name_, heads_, tokens_back(window_), state);
    extend_window(state, inputs, out,
                  [&](const Inputs<T>& seen, Tokens<T> rows) { attend(seen, rows, nullptr, context); });
    state.tokens += inputs.query.rows();
  }

  /// Takes a stream back to where it had seen `tokens` tokens, in no time: the next that come take the place of those
  /// after. Softmax can always; of a window the keys that are needed may be gone, and std::invalid_argument is thrown.
  void rewind(State& state, Index tokens) const {
    check_cache(name_, heads_, tokens_back(window_), state);
    require(0 <= tokens && tokens <= state.tokens, name_, "a stream of ", state.tokens, " tokens cannot be rewound to ",
            tokens, ".");
    const Index held = state.tokens - state.count;
    const Index needed = std::max<Index>(tokens - state.back, 0);
    require(held <= needed || needed == tokens, name_, "rewound to ", tokens, " tokens a stream needs its keys from ",
            needed, " on, but holds them from ", held, " on: keep a copy of the state.");
    state.count = std::max<Index>(tokens - held, 0);
    state.tokens = tokens;
  }

 protected:
  WindowMechanism(std::string_view name, const Heads& heads, const Options& options, Window window)
      : name_(name), heads_(heads), options_(options), window_(options.causal ? window.causal() : window) {
    check_heads(name, heads);
    check_scale<T>(name, options.scale);
    check_window(name, window);
  }

 private:
  static constexpr bool has_window = requires(const MechanismOptions& options) { options.window; };

  void check_streams() const {
    if constexpr (has_window) {
      require(window_.right == 0, name_,
              "a stream needs causal attention or window.right 0, but causal is false and window.right is ",
              window_.right, ".");
    } else {
      detail::check_streams(name_, options_.causal);
    }
  }

  void run_backward(const Inputs<T>& inputs, Tokens<const T> out, const Saved& saved, Tokens<const T> grad_out,
                    Tokens<const double> grad_log_sum_exp, const InputGradients<T>& grad_inputs,
                    Context& context) const {
    check_inputs<T>(name_, heads_, inputs, out, Lengths::any);
    check_gradients<T>(name_, heads_, inputs, out, grad_out, grad_inputs);
    check_saved(name_, "log_sum_exp", saved.log_sum_exp, heads_.query, inputs.query.rows());
    Work work(context);
    const Index queries = inputs.query.rows();
    auto* delta = work.take<Accumulator<T>>(heads_.query * queries);
    softmax_delta(work, heads_, out, grad_out, delta);
    // The log-sum-exp grows with score s_ij by the weight p_ij.
    for (Index h = 0; h < grad_log_sum_exp.rows(); ++h) {
      for (Index i = 0; i < queries; ++i) delta[h * queries + i] -= Accumulator<T>(grad_log_sum_exp(h, i));
    }
    const double* const log_sum_exp = saved.log_sum_exp.data();
    if constexpr (has_window) {
      window_backward(work, heads_, window_, scale(), inputs, log_sum_exp, grad_out, delta, grad_inputs);
    } else {
      wide_window_backward(work, heads_, window_, scale(), inputs, log_sum_exp, grad_out, delta, grad_inputs);
    }
  }

  double scale() const { return scale_or_default(options_.scale, heads_); }

  void attend(const Inputs<T>& inputs, Tokens<T> out, double* log_sum_exp, Context& context) const {
    Work work(context);
    if constexpr (has_window) {
      window_attention(work, heads_, window_, scale(), inputs, out, log_sum_exp);
    } else {
      wide_window_attention(work, heads_, window_, scale(), inputs, out, log_sum_exp);
    }
  }

  std::string_view name_;
  Heads heads_;
  Options options_;
  Window window_;
  [[no_unique_address]] Parameters parameters_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
