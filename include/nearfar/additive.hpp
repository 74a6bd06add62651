#pragma once

#include <nearfar/attention.hpp>
#include <nearfar/checks.hpp>
#include <nearfar/engine/additive/global.hpp>
#include <nearfar/engine/additive/prefix_backward.hpp>

#include <optional>
#include <string_view>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

struct AdditiveOptions {
  bool causal = false;               ///< the prefix form: token t pools the tokens up to t
  std::optional<double> scale = {};  ///< of the scores; 1 / sqrt(dim) unless given
  bool per_head_weights = false;     ///< a head's score sees its own features (the paper), not all (the authors' code)
  bool bias = true;                  ///< b_q, b_k and b_t exist
  bool transform = true;             ///< w_t and b_t exist; without them out_i = u_i + q_i
  bool add_query = true;             ///< q_i is added to out_i
};

/// What Additive learns, with D = heads.query * dim and D' = dim where weights are per head, else D. What the options
/// switch off is empty.
template <class T>
struct AdditiveParameters {
  Matrix<T> w_q;  ///< heads x D': row h scores the queries for head h
  Matrix<T> w_k;  ///< heads x D': row h scores p = gq * k for head h
  Matrix<T> b_q;  ///< 1 x heads
  Matrix<T> b_k;  ///< 1 x heads
  Matrix<T> w_t;  ///< D x D: row = output feature
  Matrix<T> b_t;  ///< 1 x D

  template <class Visit>
  void for_each(Visit&& visit) {
    each(*this, visit);
  }
  template <class Visit>
  void for_each(Visit&& visit) const {
    each(*this, visit);
  }

 private:
  static void each(auto& p, auto& visit) {
    visit("w_q", p.w_q);
    visit("w_k", p.w_k);
    visit("b_q", p.b_q);
    visit("b_k", p.b_k);
    visit("w_t", p.w_t);
    visit("b_t", p.b_t);
  }
};

/// Additive attention (Fastformer): one global query and one global key a head, each the softmax-weighted mean of all
/// tokens, take the place of pairwise scores.
///
///   alpha_i[h] = softmax over tokens i of  scale (w_q q_i + b_q)[h]        gq[h] = sum_i alpha_i[h] q_i[h]
///   p_i[h]     = gq[h] * k_i[h]                                            (feature by feature)
///   beta_i[h]  = softmax over tokens i of  scale (w_k p_i + b_k)[h]        gk[h] = sum_i beta_i[h] p_i[h]
///   u_i[h]     = gk[h] * v_i[h]                                            out_i = w_t u_i + b_t + q_i
///
/// x[h] are the features of head h; query head h reads the key and value head that its group shares. Causal: token t
/// has its own gq and gk, from softmaxes over the tokens i <= t, and p_i keeps the gq of its own token. The published
/// model has no value projection: pass the query's view as value.
///
/// Shapes: query and out n x D with D = heads.query * dim, key and value n x (heads.key_value * dim): values as wide as
/// keys, as many keys as queries.
/// Time O(n D heads), or O(n D) with per-head weights, and n D^2 for the transform. Memory beside inputs and out:
/// O(D (heads + D)), and for each sequence O(D), bidirectional for every 128 tokens, at most 64 times; backward
/// of the causal form with the transform one n x D matrix more. A second call of the same shapes allocates nothing.
///
/// The key mask takes tokens out of both softmaxes: their keys are not read, their queries and values only for their
/// own rows of out, which follow the equation. Where no token is left (causal: none up to t) gk is zero and the value
/// is not read: out_i = b_t + q_i.
///
/// b_q and b_k shift all scores of a head alike, which a softmax over tokens does not see. They are there because the
/// published model has them; they are not read, and their gradient is zero.
///
/// Wu, Wu, Qi and Huang, "Fastformer: additive attention can be all you need", arXiv 2108.09084, equations 3 to 6, and
/// the authors' code. The causal form is nearfar's own.
template <class T>
class Additive {
 public:
  using Scalar = T;
  using Options = AdditiveOptions;
  using Parameters = AdditiveParameters<T>;

  /// O(n heads) numbers, and causal O(n D / 64).
  using Saved = detail::AdditiveSaved<T>;

  /// What a stream remembers: both prefix poolings, O(D) numbers.
  struct State {
    std::vector<T> pools;
    Heads heads;
    Index tokens = 0;  ///< seen so far
  };

  /// Starts from w_q = w_k = 0 (every token weighs the same), zero biases, and w_t the identity.
  explicit Additive(const Heads& heads, const Options& options = {}) : heads_(heads), options_(options) {
    detail::check_heads(name, heads);
    detail::check_equal_widths(name, heads);
    detail::check_scale<T>(name, options.scale);
    const Index width = heads.query_cols();
    for (Matrix<T>* weights : {&parameters_.w_q, &parameters_.w_k}) {
      weights->setZero(heads.query, options.per_head_weights ? heads.dim : width);
    }
    for (Matrix<T>* bias : {&parameters_.b_q, &parameters_.b_k}) {
      if (options.bias) bias->setZero(1, heads.query);
    }
    if (options.transform) parameters_.w_t.setIdentity(width, width);
    if (options.transform && options.bias) parameters_.b_t.setZero(1, width);
  }

  const Heads& heads() const { return heads_; }
  const Options& options() const { return options_; }
  const Parameters& parameters() const { return parameters_; }
  Parameters& parameters() { return parameters_; }

  /// Throws std::invalid_argument where shapes disagree, those of the parameters included.
  void forward(const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    run(inputs, out, nullptr, nullptr, context);
  }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Saved& saved, Context& context = default_context()) const {
    run(inputs, out, &saved, nullptr, context);
  }

  /// Writes the gradients of query, key and value, each to a matrix of its own (where one view serves as two of them,
  /// its gradient is their sum), and adds those of the parameters. Of a masked token nothing is read if its row of
  /// grad_out is zero. Two to three times the time of forward.
  ///
  /// Throws std::invalid_argument where shapes disagree, those of grad_parameters and saved included.
  void backward(const Inputs<T>& inputs, Tokens<const T> out, const Saved& saved, Tokens<const T> grad_out,
                const InputGradients<T>& grad_inputs, Parameters& grad_parameters,
                Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::equal);
    check_parameters(parameters_, "");
    detail::check_gradients<T>(name, heads_, inputs, out, grad_out, grad_inputs);
    check_parameters(grad_parameters, "the gradient of ");
    detail::check_apart(name, parameters_, grad_parameters);
    detail::Work work(context);
    const detail::AdditiveCall<T> call = prepare(inputs, work);
    check_saved(call, saved);
    const Index width = heads_.query_cols();
    const auto take_weights = [&] { return detail::take_rows<T>(work, heads_.query, width); };
    detail::AdditiveGradients<T> gradients{.saved = saved,
                                           .out = grad_out,
                                           .u = grad_out,
                                           .inputs = grad_inputs,
                                           .w_q = take_weights(),
                                           .w_k = take_weights()};
    if (options_.transform) {
      detail::PackedMatrix<T> w_t(work, width, width);
      w_t.pack(work, [&](Index k, Index c) { return parameters_.w_t(k, c); });
      detail::transform_backward(call, grad_out, w_t, grad_inputs.query);
      gradients.u = grad_inputs.query;
      gradients.w_t = grad_parameters.w_t;
      if (options_.bias) gradients.b_t = grad_parameters.b_t.data();
    }
    options_.causal ? detail::additive_prefix_backward(call, gradients)
                    : detail::additive_global_backward(call, gradients);
    add_packed(gradients.w_q, grad_parameters.w_q);
    add_packed(gradients.w_k, grad_parameters.w_k);
  }

  /// A stream that has seen nothing. Only causal attention has one.
  State start() const {
    detail::check_streams(name, options_.causal);
    const detail::PoolingShape shape{heads_.query, heads_.dim};
    State state{std::vector<T>(state_size()), heads_};
    for (T* pool : {state.pools.data(), state.pools.data() + state_size() / 2})
      detail::SoftmaxPool<T>::at(pool, shape).start(shape);
    return state;
  }

  /// Appends tokens to a stream and writes their rows of out.
  void extend(State& state, const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    detail::check_streams(name, options_.causal);
    detail::check_stream_inputs<T>(name, heads_, inputs, out);
    detail::require(state.pools.size() == state_size(), name, "this state holds ", state.pools.size(),
                    " numbers, but its heads need ", state_size(), ": take it from start().");
    detail::check_state_heads(name, state.heads, heads_);
    run(inputs, out, nullptr, &state, context);
    state.tokens += inputs.query.rows();
  }

 private:
  static constexpr std::string_view name = "Additive";

  // Of both poolings of a stream.
  std::size_t state_size() const {
    return static_cast<std::size_t>(2 * detail::SoftmaxPool<T>::size({heads_.query, heads_.dim}));
  }

  void check_parameters(const Parameters& p, std::string_view of) const {
    const Index width = heads_.query_cols();
    const Index seen = options_.per_head_weights ? heads_.dim : width;
    const auto check = [&](std::string_view matrix, const Matrix<T>& m, bool present, Index rows, Index cols) {
      detail::check_parameter(name, m, present ? rows : 0, present ? cols : 0, of, matrix);
    };
    check("w_q", p.w_q, true, heads_.query, seen);
    check("w_k", p.w_k, true, heads_.query, seen);
    check("b_q", p.b_q, options_.bias, 1, heads_.query);
    check("b_k", p.b_k, options_.bias, 1, heads_.query);
    check("w_t", p.w_t, options_.transform, width, width);
    check("b_t", p.b_t, options_.transform && options_.bias, 1, width);
  }

  void check_saved(const detail::AdditiveCall<T>& call, const Saved& saved) const {
    const Index n = call.inputs.query.rows(), padded = call.query_shape().padded();
    const Index means = saved_means(call), width = heads_.query_cols();
    detail::check_saved(name, "query_weights", saved.query_weights, n, padded);
    detail::check_saved(name, "key_weights", saved.key_weights, n, padded);
    detail::check_saved(name, "query_means", saved.query_means, means, width);
    detail::check_saved(name, "key_means", saved.key_means, means, width);
  }

  Index saved_means(const detail::AdditiveCall<T>& call) const {
    return options_.causal ? call.stretches.count() : call.stretches.sequences();
  }

  detail::AdditiveCall<T> prepare(const Inputs<T>& inputs, detail::Work& work) const {
    // Bidirectional: at most 64 poolings to merge, however long the sequence, and none of few tokens.
    const auto length = [&](Index tokens) {
      return options_.causal ? detail::prefix_stretch : std::max<Index>(128, (tokens + 63) / 64);
    };
    return {.inputs = inputs,
            .heads = heads_,
            .per_head_weights = options_.per_head_weights,
            .add_query = options_.add_query,
            .w_q = pack(parameters_.w_q, work),
            .w_k = pack(parameters_.w_k, work),
            .stretches = detail::Stretches(work, inputs, length),
            .work = work};
  }

  /// Score weights as pooling wants them: times scale and log2 e, over all heads' features, rows of zeros up to whole
  /// blocks of heads. Per-head weights are a block diagonal.
  const T* pack(const Matrix<T>& weights, detail::Work& work) const {
    const Index width = heads_.query_cols();
    const Index rows = detail::PoolingShape{heads_.query, heads_.dim}.padded();
    const Tokens<T> packed = detail::take_rows<T>(work, rows, width);
    std::fill_n(packed.data(), rows * width, T(0));
    for (Index h = 0; h < heads_.query; ++h) {
      for (Index c = 0; c < weights.cols(); ++c) packed(h, first_column(h) + c) = weight_factor() * weights(h, c);
    }
    return packed.data();
  }

  void add_packed(Tokens<const T> gradient, Matrix<T>& to) const {
    for (Index h = 0; h < heads_.query; ++h) {
      to.row(h) += weight_factor() * gradient.matrix().row(h).segment(first_column(h), to.cols());
    }
  }

  Index first_column(Index head) const { return options_.per_head_weights ? head * heads_.dim : 0; }

  T weight_factor() const { return detail::log2_scale<T>(detail::scale_or_default(options_.scale, heads_)); }

  void run(const Inputs<T>& inputs, Tokens<T> out, Saved* saved, State* state, Context& context) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::equal);
    check_parameters(parameters_, "");
    detail::Work work(context);
    const detail::AdditiveCall<T> call = prepare(inputs, work);
    detail::AdditiveOut<T> result{.rows = out, .transform = options_.transform, .saved = saved};
    const Index width = heads_.query_cols();
    if (options_.transform) {
      result.w_t = detail::PackedMatrix<T>(work, width, width);
      result.w_t.pack(work, [&](Index k, Index c) { return parameters_.w_t(c, k); });
      if (options_.bias) result.b_t = parameters_.b_t.data();
    }
    if (saved != nullptr) {
      saved->query_weights.setZero(inputs.query.rows(), call.query_shape().padded());
      saved->key_weights.setZero(inputs.query.rows(), call.query_shape().padded());
      saved->query_means.resize(saved_means(call), width);
      saved->key_means.resize(saved_means(call), width);
    }
    if (options_.causal) {
      detail::additive_prefix(call, result, state == nullptr ? nullptr : state->pools.data());
    } else {
      detail::additive_global(call, result);
    }
  }

  Heads heads_;
  Options options_;
  Parameters parameters_;
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
