#pragma once

#include <nearfar/detail/errors.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Heads that fit together, checked when a mechanism is made.
inline void check_heads(std::string_view mechanism, const Heads& heads) {
  require(heads.query >= 1, mechanism, "heads.query must be at least 1, but is ", heads.query, ".");
  require(heads.key_value >= 1, mechanism, "heads.key_value must be at least 1, but is ", heads.key_value, ".");
  require(heads.dim >= 1, mechanism, "heads.dim must be at least 1, but is ", heads.dim, ".");
  require(heads.value_dim >= 0, mechanism, "heads.value_dim must be 0 (as dim) or more, but is ", heads.value_dim, ".");
  require(heads.query % heads.key_value == 0, mechanism, "heads.key_value must divide heads.query, but ",
          heads.key_value, " does not divide ", heads.query, ".");
  const Index width = std::max(heads.dim, heads.value_width());
  const Index most = std::numeric_limits<Index>::max() / heads.query;
  require(width <= most, mechanism, "heads.dim and heads.value_dim must be at most ", most, " for ", heads.query,
          " query heads, but the larger is ", width, ".");
}

/// value_dim that equals dim: Additive multiplies keys and values feature by feature, and Multipole pools both by the
/// width of one head.
inline void check_equal_widths(std::string_view mechanism, const Heads& heads) {
  require(heads.value_width() == heads.dim, mechanism, "heads.value_dim must equal heads.dim, but they are ",
          heads.value_dim, " and ", heads.dim, ".");
}

template <class T>
void check_scale(std::string_view mechanism, const std::optional<double>& scale) {
  require(!scale || (*scale > 0 && *scale < std::numeric_limits<double>::infinity()), mechanism,
          "scale must be positive and finite, but is ", scale.value_or(0), ".");
  using Limits = std::numeric_limits<T>;
  require(!scale || (*scale >= Limits::denorm_min() && *scale <= Limits::max()), mechanism,
          "scale must be positive and finite as a float, but is ", scale.value_or(0), ".");
}

inline void check_window(std::string_view mechanism, const Window& window) {
  require(window.left >= 0, mechanism, "window.left must be 0 or more, but is ", window.left, ".");
  require(window.right >= 0, mechanism, "window.right must be 0 or more, but is ", window.right, ".");
}

template <class Scalar>
void check_shape(std::string_view mechanism, std::string_view name, Tokens<Scalar> tokens, Index rows, Index cols,
                 std::string_view rows_of, std::string_view cols_of) {
  require(tokens.rows() == rows, mechanism, name, " has ", tokens.rows(), " rows, but ", rows_of, " has ", rows, ".");
  require(tokens.cols() == cols, mechanism, name, " has ", tokens.cols(), " columns, but ", cols_of, " need ", cols,
          ".");
}

/// What each query of each head has, such as a log-sum-exp.
template <class Scalar>
void check_head_rows(std::string_view mechanism, std::string_view name, Tokens<Scalar> rows, Index heads,
                     Index queries) {
  require(rows.rows() == heads && rows.cols() == queries, mechanism, name, " is ", rows.rows(), " x ", rows.cols(),
          ", but these heads and queries need ", heads, " x ", queries, ".");
}

inline void check_offsets(std::string_view mechanism, std::string_view name, std::span<const Index> offsets, Index rows,
                          std::string_view rows_of) {
  require(!offsets.empty(), mechanism, name, " must hold at least one number, but is empty.");
  require(offsets.front() == 0, mechanism, name, " must begin with 0, but begins with ", offsets.front(), ".");
  for (std::size_t b = 1; b < offsets.size(); ++b) {
    require(offsets[b - 1] <= offsets[b], mechanism, name, " must not decrease, but ", offsets[b], " follows ",
            offsets[b - 1], ".");
  }
  require(offsets.back() == rows, mechanism, name, " must end with the rows of ", rows_of, ", ", rows,
          ", but ends with ", offsets.back(), ".");
}

/// A result beside what it is made from. (That they do not overlap in any other way is the caller's to see to.)
template <class Scalar>
void check_distinct(std::string_view mechanism, std::string_view name, Tokens<const Scalar> result,
                    std::initializer_list<std::pair<std::string_view, Tokens<const Scalar>>> inputs) {
  for (const auto& [of, input] : inputs) {
    require(result.rows() == 0 || result.data() != input.data(), mechanism, name,
            " must be a matrix of its own, but begins where ", of, " does.");
  }
}

/// Whether queries and keys are the same tokens, or may differ in number.
enum class Lengths { equal, any };

/// Inputs and out that agree with the heads and with each other.
template <class Scalar>
void check_inputs(std::string_view mechanism, const Heads& heads, const Inputs<Scalar>& inputs,
                  Tokens<const Scalar> out, Lengths lengths) {
  const Index queries = inputs.query.rows();
  const Index keys = inputs.key.rows();
  check_shape(mechanism, "query", inputs.query, queries, heads.query_cols(), "query", "its heads");
  check_shape(mechanism, "key", inputs.key, keys, heads.key_cols(), "key", "its heads");
  check_shape(mechanism, "value", inputs.value, keys, heads.value_cols(), "key", "its heads");
  check_shape(mechanism, "out", out, queries, heads.out_cols(), "query", "its heads");
  check_distinct<Scalar>(mechanism, "out", out,
                         {{"query", inputs.query}, {"key", inputs.key}, {"value", inputs.value}});
  require(inputs.key_mask.empty() || static_cast<Index>(inputs.key_mask.size()) == keys, mechanism, "key_mask has ",
          inputs.key_mask.size(), " bytes, but key has ", keys, " rows.");
  require(!inputs.query_offsets.empty() || inputs.key_offsets.empty(), mechanism, "key_offsets are given, ",
          inputs.key_offsets.size(), " numbers, but query_offsets are empty.");
  if (!inputs.query_offsets.empty()) {
    check_offsets(mechanism, "query_offsets", inputs.query_offsets, queries, "query");
    if (inputs.key_offsets.empty()) {
      require(queries == keys, mechanism, "without key_offsets, query and key must have the same rows, but have ",
              queries, " and ", keys, ".");
    } else {
      check_offsets(mechanism, "key_offsets", inputs.key_offsets, keys, "key");
      require(inputs.query_offsets.size() == inputs.key_offsets.size(), mechanism, "query_offsets has ",
              inputs.query_offsets.size(), " numbers, but key_offsets has ", inputs.key_offsets.size(), ".");
    }
  }
  if (lengths == Lengths::equal) {
    require(queries == keys, mechanism, "query and key must have the same rows, but have ", queries, " and ", keys,
            ".");
    for (std::size_t b = 0; b < inputs.key_offsets.size(); ++b) {
      require(inputs.key_offsets[b] == inputs.query_offsets[b], mechanism,
              "query_offsets and key_offsets must be equal, but hold ", inputs.query_offsets[b], " and ",
              inputs.key_offsets[b], ".");
    }
  }
}

/// Only what is causal has a stream.
inline void check_streams(std::string_view mechanism, bool causal) {
  require(causal, mechanism, "a stream needs causal attention, but causal is false.");
}

/// A state of the heads that read it: numbers alone do not say how they are divided.
inline void check_state_heads(std::string_view mechanism, const Heads& of_state, const Heads& heads) {
  require(of_state.query == heads.query && of_state.key_value == heads.key_value && of_state.dim == heads.dim &&
              of_state.value_width() == heads.value_width(),
          mechanism, "this state is of ", of_state.query, " query and ", of_state.key_value, " key/value heads of ",
          of_state.dim, " and ", of_state.value_width(), " features, but these are ", heads.query, " and ",
          heads.key_value, " of ", heads.dim, " and ", heads.value_width(), ": take it from start().");
}

/// Tokens to append to a stream.
template <class Scalar>
void check_stream_inputs(std::string_view mechanism, const Heads& heads, const Inputs<Scalar>& inputs,
                         Tokens<const Scalar> out) {
  check_inputs<Scalar>(mechanism, heads, inputs, out, Lengths::equal);
  require(inputs.query_offsets.empty(), mechanism, "a stream is one sequence, but query_offsets has ",
          inputs.query_offsets.size(), " numbers.");
}

/// Gradients of the shapes of what they belong to, apart from what is read and from each other.
template <class Scalar>
void check_gradients(std::string_view mechanism, const Heads& heads, const Inputs<Scalar>& inputs,
                     Tokens<const Scalar> out, Tokens<const Scalar> grad_out, const InputGradients<Scalar>& gradients) {
  check_shape(mechanism, "grad_out", grad_out, inputs.query.rows(), heads.out_cols(), "query", "its heads");
  check_shape(mechanism, "grad_query", gradients.query, inputs.query.rows(), heads.query_cols(), "query", "its heads");
  check_shape(mechanism, "grad_key", gradients.key, inputs.key.rows(), heads.key_cols(), "key", "its heads");
  check_shape(mechanism, "grad_value", gradients.value, inputs.key.rows(), heads.value_cols(), "key", "its heads");
  const auto check_own = [&](std::string_view name, Tokens<const Scalar> gradient) {
    check_distinct<Scalar>(
        mechanism, name, gradient,
        {{"query", inputs.query}, {"key", inputs.key}, {"value", inputs.value}, {"out", out}, {"grad_out", grad_out}});
  };
  check_own("grad_query", gradients.query);
  check_own("grad_key", gradients.key);
  check_own("grad_value", gradients.value);
  check_distinct<Scalar>(mechanism, "grad_key", gradients.key, {{"grad_query", gradients.query}});
  check_distinct<Scalar>(mechanism, "grad_value", gradients.value,
                         {{"grad_query", gradients.query}, {"grad_key", gradients.key}});
}

/// A parameter, or its gradient, of the shape that it needs; its name may be in parts.
template <class Scalar, class... Name>
void check_parameter(std::string_view mechanism, const Matrix<Scalar>& parameter, Index rows, Index cols,
                     const Name&... name) {
  require(parameter.rows() == rows && parameter.cols() == cols, mechanism, name..., " must be ", rows, " x ", cols,
          ", but is ", parameter.rows(), " x ", parameter.cols(), ".");
}

/// Gradients are added beside the parameters that they are of.
template <class Parameters>
void check_apart(std::string_view mechanism, const Parameters& parameters, const Parameters& grad_parameters) {
  require(&parameters != &grad_parameters, mechanism,
          "grad_parameters are the parameters themselves: pass a copy of them, set to zero.");
}

/// What forward saved for these inputs, and not for others.
template <class Scalar>
void check_saved(std::string_view mechanism, std::string_view name, const Matrix<Scalar>& saved, Index rows,
                 Index cols) {
  require(saved.rows() == rows && saved.cols() == cols, mechanism, "saved.", name, " is ", saved.rows(), " x ",
          saved.cols(), ", but these inputs need ", rows, " x ", cols, ": save it by a forward pass over them.");
}

/// 1 / sqrt(dim) unless given.
inline double scale_or_default(const std::optional<double>& scale, const Heads& heads) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(heads.dim)));
}

}  // namespace detail

// The checks that a mechanism of your own needs: of its heads when it is made, and of what it is given in every call.
using detail::check_gradients;
using detail::check_heads;
using detail::check_inputs;
using detail::check_saved;
using detail::check_stream_inputs;
using detail::Lengths;
using detail::require;

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
