#pragma once

#include <nearfar/checks.hpp>
#include <nearfar/engine/softmax/key_value_cache.hpp>
#include <nearfar/engine/softmax/window_attention.hpp>
#include <nearfar/engine/softmax/window_backward.hpp>
#include <nearfar/linear.hpp>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

/// What a blend weight passes through before it multiplies: the logistic sigmoid, as in the paper, or nothing, as in
/// the authors' code.
enum class Gate { sigmoid, identity };

/// Whether each head and feature has a blend weight of its own, each head has one, or all share one.
enum class BlendWeights { per_feature, per_head, shared };

struct FmmOptions {
  /// How far a query sees in the near field, both ends inclusive; the default is the paper's band 30.
  Window window = {29, 29};
  /// At least one; each has a far field and a blend weight of its own.
  std::vector<AnyFeatureMap> feature_maps = {feature_map::Elu{}};
  /// Hides later keys, from the near field and from the far field.
  bool causal = false;
  /// What query . key is multiplied by in the near field; 1 / sqrt(dim) unless given.
  std::optional<double> scale = {};
  Normalizer normalizer = Normalizer::row_sum;
  /// Added to the row sums of the far field; 0 or more.
  double eps = 1e-6;
  /// Divides the features of each query and key, a head, by their sum.
  bool normalize_features = false;
  Gate gate = Gate::sigmoid;
  BlendWeights weights = BlendWeights::per_feature;
};

/// The blend weights, before the gate: of the near field, and of the far field of each feature map. Each is
/// heads.query x value_dim, or heads.query x 1 per head, or 1 x 1 shared.
template <class T>
struct FmmParameters {
  Matrix<T> near;
  std::vector<Matrix<T>> far;

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
    visit("w_near", p.near);
    for (std::size_t r = 0; r < p.far.size(); ++r) {
      const std::string name = "w_far_" + std::to_string(r);
      visit(name, p.far[r]);
    }
  }
};

/// Attention as the fast multipole method has it: a near field that is exact within a window, and a far field of low
/// rank, blended with learned weights.
///
///   out_i = g(w_near) * banded_i + sum_r g(w_far_r) * linear_ri      element by element, for each head
///
/// with banded as in banded.hpp, linear_r as in linear.hpp for feature map r alone, weights that are the same for all
/// tokens, and the gate g. New weights are w_near = 0 and w_far = 1, as in the paper.
///
/// Shapes as Softmax. Time and memory beside inputs and out: the sum of Banded and Linear; each part is weighted where
/// it is finished, and nothing of size n is kept. A second call of the same shapes allocates nothing. Masked keys enter
/// neither field. A query that sees no key in the window gets the far field alone, and one that sees no key at all a
/// zero row.
/// Streams (causal, row_sum) remember what Banded and Linear do: the last window.left keys and values, and O(1) sums.
/// Source: Nguyen et al., FMMformer, arXiv 2108.02347, equations 5 and 9, blended.
template <class T>
class Fmm {
 public:
  using Scalar = T;
  using Options = FmmOptions;
  using Parameters = FmmParameters<T>;

  /// The near field before it is weighted, of the shape of out; the log-sum-exp of its scores, heads.query x n_q; and
  /// what Linear saves.
  struct Saved {
    Matrix<T> near;
    Matrix<double> log_sum_exp;
    Matrix<T> inverse_normalizer;
  };

  /// What a stream remembers: the last window.left keys and values, in room as Banded's, and the sums of Linear.
  struct State {
    detail::KeyValueCache<T> near;
    typename detail::KernelSum<T>::State far;
    Index tokens = 0;  ///< seen so far
  };

  explicit Fmm(const Heads& heads, const Options& options = {}) : heads_(heads), options_(options) {
    detail::check_heads(name, heads);
    detail::check_scale<T>(name, options.scale);
    detail::check_window(name, options.window);
    detail::check_linear(name, options.feature_maps, options.eps);
    parameters_.near.setZero(weight_rows(), weight_cols());
    parameters_.far.assign(options.feature_maps.size(), Matrix<T>::Ones(weight_rows(), weight_cols()));
  }

  const Heads& heads() const { return heads_; }
  const Options& options() const { return options_; }
  const Parameters& parameters() const { return parameters_; }
  Parameters& parameters() { return parameters_; }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::any);
    check_parameters(parameters_, "");
    detail::Work work(context);
    const Gates gates = open_gates(work);
    attend_near(work, gates, inputs, out);
    far().forward({.inputs = inputs, .out = out, .weights = gates.far, .add = true}, work);
  }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Saved& saved, Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::any);
    check_parameters(parameters_, "");
    detail::Work work(context);
    const Gates gates = open_gates(work);
    saved.near.resize(out.rows(), out.cols());
    saved.log_sum_exp.resize(heads_.query, inputs.query.rows());
    detail::window_attention(work, heads_, window(), scale(), inputs, Tokens<T>(saved.near), saved.log_sum_exp.data());
    weigh(work, saved.near, gates.near, out);
    far().forward({.inputs = inputs,
                   .out = out,
                   .weights = gates.far,
                   .add = true,
                   .inverse_normalizer = &saved.inverse_normalizer},
                  work);
  }

  /// Memory beside inputs and gradients: one array of the size of out, and what the parts need.
  void backward(const Inputs<T>& inputs, Tokens<const T> out, const Saved& saved, Tokens<const T> grad_out,
                const InputGradients<T>& grad_inputs, Parameters& grad_parameters,
                Context& context = default_context()) const {
    const Index rows = inputs.query.rows();
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::any);
    detail::check_gradients<T>(name, heads_, inputs, out, grad_out, grad_inputs);
    check_parameters(parameters_, "");
    check_parameters(grad_parameters, "the gradient of ");
    detail::check_apart(name, parameters_, grad_parameters);
    detail::check_saved(name, "near", saved.near, rows, heads_.out_cols());
    detail::check_saved(name, "log_sum_exp", saved.log_sum_exp, heads_.query, rows);
    detail::check_saved(name, "inverse_normalizer", saved.inverse_normalizer, rows, maps() * heads_.query);
    detail::Work work(context);
    const Gates gates = open_gates(work);
    const Tokens<T> grad_gates = take_gates(work);
    grad_gates.matrix().setZero();

    const Tokens<T> grad_near = detail::take_rows<T>(work, rows, heads_.out_cols());
    weigh(work, grad_out, gates.near, grad_near);
    add_gate_gradient(work, saved.near, grad_out, grad_gates.middle_rows(0, heads_.query));
    T* delta = work.take<T>(heads_.query * rows);
    detail::softmax_delta<T>(work, heads_, saved.near, grad_near, delta);
    detail::window_backward<T>(work, heads_, window(), scale(), inputs, saved.log_sum_exp.data(), grad_near, delta,
                               grad_inputs);
    far().backward({.inputs = inputs,
                    .grad_out = grad_out,
                    .inverse_normalizer = saved.inverse_normalizer,
                    .grad = grad_inputs,
                    .weights = gates.far,
                    .grad_weights = grad_gates.middle_rows(heads_.query, maps() * heads_.query),
                    .add = true},
                   work);
    close_gates(gates, grad_gates, grad_parameters);
  }

  /// A stream that has seen nothing. The attention must be causal and normalised by row_sum. `room` as in Banded.
  State start(Index room = 0) const {
    detail::check_linear_stream(name, options_.causal, options_.normalizer);
    return {detail::start_window<T>(name, heads_, detail::tokens_back(window()), room), far().start()};
  }

  /// Appends tokens, with as many queries as keys, to a stream and writes their rows of out. The blend weights may
  /// change between calls. O(window) memory in the tokens seen.
  void extend(State& state, const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    detail::check_linear_stream(name, options_.causal, options_.normalizer);
    detail::check_stream_inputs<T>(name, heads_, inputs, out);
    detail::check_cache(name, heads_, detail::tokens_back(window()), state.near);
    far().check_state(name, state.far);
    check_parameters(parameters_, "");
    detail::Work work(context);
    const Gates gates = open_gates(work);
    detail::extend_window(state.near, inputs, out,
                          [&](const Inputs<T>& seen, Tokens<T> rows) { attend_near(work, gates, seen, rows); });
    far().forward({.inputs = inputs, .out = out, .weights = gates.far, .add = true, .state = &state.far}, work);
    state.tokens += inputs.query.rows();
  }

 private:
  static constexpr std::string_view name = "Fmm";

  /// g(w) for every head and feature: heads.query x value_dim, and as many rows for each feature map.
  struct Gates {
    Tokens<const T> near;
    Tokens<const T> far;
  };

  detail::KernelSum<T> far() const { return detail::kernel_sum<T>(heads_, options_); }
  Window window() const { return options_.causal ? options_.window.causal() : options_.window; }
  double scale() const { return detail::scale_or_default(options_.scale, heads_); }

  T gate(T weight) const { return options_.gate == Gate::identity ? weight : T(1) / (T(1) + std::exp(-weight)); }

  Index maps() const { return static_cast<Index>(options_.feature_maps.size()); }

  Tokens<T> take_gates(detail::Work& work) const {
    const Index rows = (1 + maps()) * heads_.query, cols = heads_.value_width();
    return detail::take_rows<T>(work, rows, cols);
  }

  // Calls visit(weight, row, col) for every gate and the weight that opens it.
  template <class P, class Visit>
  void for_each_gate(P& parameters, Visit&& visit) const {
    for (Index r = 0; r < 1 + maps(); ++r) {
      auto& weights = r == 0 ? parameters.near : parameters.far[static_cast<std::size_t>(r - 1)];
      for (Index h = 0; h < heads_.query; ++h) {
        for (Index c = 0; c < heads_.value_width(); ++c) {
          visit(weights(std::min(h, weights.rows() - 1), std::min(c, weights.cols() - 1)), r * heads_.query + h, c);
        }
      }
    }
  }

  Gates open_gates(detail::Work& work) const {
    const Tokens<T> gates = take_gates(work);
    for_each_gate(parameters_, [&](T weight, Index row, Index col) { gates(row, col) = gate(weight); });
    return {gates.middle_rows(0, heads_.query), gates.middle_rows(heads_.query, maps() * heads_.query)};
  }

  // The near field, weighted.
  void attend_near(detail::Work& work, const Gates& gates, const Inputs<T>& inputs, Tokens<T> out) const {
    detail::window_attention(work, heads_, window(), scale(), inputs, out, nullptr, gates.near);
  }

  // The gradients of the weights from those of the gates.
  void close_gates(const Gates& gates, Tokens<const T> grad_gates, Parameters& grad_parameters) const {
    for_each_gate(grad_parameters, [&](T& grad_weight, Index row, Index col) {
      const T g = row < heads_.query ? gates.near(row, col) : gates.far(row - heads_.query, col);
      grad_weight += grad_gates(row, col) * (options_.gate == Gate::sigmoid ? g * (T(1) - g) : T(1));
    });
  }

  // to_i = gate * from_i for every token.
  void weigh(detail::Work& work, Tokens<const T> from, Tokens<const T> gate, Tokens<T> to) const {
    const detail::RowArray<const T> factor(gate.data(), to.cols());
    for_each_block(work, to.rows(), [&](Index, Index first, Index count) {
      to.middle_rows(first, count).matrix().array() =
          from.middle_rows(first, count).matrix().array().rowwise() * factor;
    });
  }

  // grad_gate += sum_i near_i * grad_out_i, block by block in their order.
  void add_gate_gradient(detail::Work& work, Tokens<const T> near, Tokens<const T> grad_out,
                         Tokens<T> grad_gate) const {
    using Row = detail::RowArray<T>;
    const Index cols = near.cols();
    T* partial = work.take<T>(blocks(near.rows()) * cols);
    for_each_block(work, near.rows(), [&](Index block, Index first, Index count) {
      Row sum(partial + block * cols, cols);
      sum.setZero();
      for (Index i = first; i < first + count; ++i) {
        sum += near.middle_rows(i, 1).matrix().array() * grad_out.middle_rows(i, 1).matrix().array();
      }
    });
    for (Index b = 0; b < blocks(near.rows()); ++b) Row(grad_gate.data(), cols) += Row(partial + b * cols, cols);
  }

  static constexpr Index block_rows = 512;
  static Index blocks(Index rows) { return detail::ceil_div(rows, block_rows); }

  template <class Visit>
  static void for_each_block(detail::Work& work, Index rows, Visit&& visit) {
    work.for_each(blocks(rows), [&](Index block, detail::Scratch&) {
      visit(block, block * block_rows, std::min(block_rows, rows - block * block_rows));
    });
  }

  Index weight_rows() const { return options_.weights == BlendWeights::shared ? 1 : heads_.query; }
  Index weight_cols() const { return options_.weights == BlendWeights::per_feature ? heads_.value_width() : 1; }

  void check_parameters(const Parameters& p, std::string_view of) const {
    detail::require(p.far.size() == options_.feature_maps.size(), name, of, "w_far must be ",
                    options_.feature_maps.size(), " matrices, one a feature map, but is ", p.far.size(), ".");
    detail::check_parameter(name, p.near, weight_rows(), weight_cols(), of, "w_near");
    for (std::size_t r = 0; r < p.far.size(); ++r) {
      detail::check_parameter(name, p.far[r], weight_rows(), weight_cols(), of, "w_far_", r);
    }
  }

  Heads heads_;
  Options options_;
  Parameters parameters_;
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
