#pragma once

#include <nearfar/context.hpp>
#include <nearfar/tokens.hpp>

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

/// How the columns of query, key, value and out are divided into heads.
///
/// Query head h owns columns h*dim .. h*dim + dim - 1 of the query, and reads key/value head h / (query / key_value):
/// key_value divides query. `value_dim` is the width of one head of value and out; 0 means dim.
struct Heads {
  Index query = 1;
  Index key_value = 1;
  Index dim = 0;
  Index value_dim = 0;

  Index value_width() const { return value_dim == 0 ? dim : value_dim; }
  Index group() const { return query / key_value; }
  Index query_cols() const { return query * dim; }
  Index key_cols() const { return key_value * dim; }
  Index value_cols() const { return key_value * value_width(); }
  Index out_cols() const { return query * value_width(); }

  bool operator==(const Heads&) const = default;
};

/// A view of a list in memory, such as a std::vector: the bytes of a mask, or the offsets of a batch. It never owns.
template <class Element>
struct List : std::span<const Element> {
  using std::span<const Element>::span;
  List(std::span<const Element> list) : std::span<const Element>(list) {}

  template <class Never = Element>
  List(std::initializer_list<Element>) {
    static_assert(detail::never<Never>,
                  "nearfar: a list in braces is gone before it is read: name it, as a std::vector or an array.");
  }

  template <class Other>
  requires(!std::is_constructible_v<std::span<const Element>, const Other&>) List(const Other&) {
    static_assert(
        detail::never<Other>,
        "nearfar: a key_mask is a std::vector, array or span of std::uint8_t (not of bool), and offsets are one "
        "of nearfar::Index (std::ptrdiff_t): this is neither.");
  }
};

/// What attention reads.
///
///   query  n_q x (heads.query * dim)          key    n_k x (heads.key_value * dim)
///   value  n_k x (heads.key_value * value_dim)
///
/// `key_mask` has one byte a key, 0 = never seen by any query; empty means that every key may be seen. What stands in
/// the key and value rows of a masked key is never read into a result, not even NaN; but in Additive a token's value
/// makes its own row of out, masked or not.
///
/// `query_offsets` packs several sequences end to end (the field's cu_seqlens): sequence b owns the query rows
/// query_offsets[b] .. query_offsets[b + 1] - 1 and the key rows that key_offsets gives likewise. No token sees another
/// sequence. Empty query_offsets mean one sequence; empty key_offsets mean that keys are divided as queries are.
template <class Scalar>
struct Inputs {
  static_assert(std::is_same_v<Scalar, float> || std::is_same_v<Scalar, double>,
                "nearfar: attention is of float or double, and of no other scalar type.");

  Tokens<const Scalar> query;
  Tokens<const Scalar> key;
  Tokens<const Scalar> value;
  List<std::uint8_t> key_mask = {};
  List<Index> query_offsets = {};
  List<Index> key_offsets = {};
};

/// What the backward pass writes: the gradients of query, key and value, each of the shape of what it belongs to.
template <class Scalar>
struct InputGradients {
  Tokens<Scalar> query;
  Tokens<Scalar> key;
  Tokens<Scalar> value;
};

/// The parameters of a mechanism that has nothing to learn.
///
/// Every mechanism's Parameters is a plain struct of matrices whose `for_each(visit)` calls visit(name, matrix) for
/// each of them in a fixed order, const or not, by names that are or become a std::string: that is how an optimiser
/// steps them, a checkpoint writes them, and a gradient is set to zero.
struct NoParameters {
  template <class Visit>
  void for_each(Visit&&) const {}
};

namespace detail {

struct Ignore {
  void operator()(auto&&...) const {}
};

}  // namespace detail

/// A copy of parameters, every matrix zero: what backward adds gradients to.
template <class Parameters>
requires requires(Parameters& parameters) { parameters.for_each(detail::Ignore{}); }
Parameters zeros_like(Parameters parameters) {
  parameters.for_each([](const auto&, auto& matrix) { matrix.setZero(); });
  return parameters;
}

/// Attention: something that maps query, key and value to out (n_q x heads.query * value_dim).
///
/// `forward` is const and may be called from several threads at once. It throws std::invalid_argument, before anything
/// is written, if shapes disagree. `out` must not overlap an input.
template <class A>
concept Attention = requires(const A& attention, const Inputs<typename A::Scalar>& inputs,
                             Tokens<typename A::Scalar> out) {
  typename A::Scalar;
  { attention.heads() } -> std::convertible_to<Heads>;
  attention.forward(inputs, out);
};

/// Attention that can be trained. `forward` leaves in `saved` what `backward` needs; `backward` writes the gradients of
/// the inputs and adds those of the parameters to `grad_parameters`, which begin as zeros_like(parameters()), so that a
/// batch may be split. The parameters of an object that is not const are stepped where they stand.
template <class A>
concept DifferentiableAttention = Attention<A> &&
    requires(A& trained, const A& attention, const Inputs<typename A::Scalar>& inputs, Tokens<typename A::Scalar> out,
             Tokens<const typename A::Scalar> read, typename A::Saved& saved, const typename A::Saved& kept,
             const InputGradients<typename A::Scalar>& grad_inputs, typename A::Parameters& grad_parameters) {
  { attention.parameters() } -> std::convertible_to<const typename A::Parameters&>;
  trained.parameters().for_each(detail::Ignore{});
  grad_parameters.for_each(detail::Ignore{});
  attention.forward(inputs, out, saved);
  attention.backward(inputs, read, kept, read, grad_inputs, grad_parameters);
};

/// Attention that can go on where it stopped: `extend` appends tokens (1 or 1000) to a sequence and gives their rows of
/// out, the same rows that `forward` gives for the whole sequence. A state is a value: a copy goes on by itself, as a
/// beam search needs it. It holds one sequence, of this attention or one of the same heads, options and parameters. If
/// `extend` throws anything but std::invalid_argument (memory that runs out, say), the state is lost. `start` may take
/// how many tokens to make room for.
template <class A>
concept StreamingAttention = Attention<A> &&
    requires(const A& attention, typename A::State& state, const Inputs<typename A::Scalar>& inputs,
             Tokens<typename A::Scalar> out) {
  { attention.start() } -> std::same_as<typename A::State>;
  attention.extend(state, inputs, out);
};

/// attention.forward(inputs, out, context), or without the context where a mechanism of your own does not take one; the
/// functions below call likewise, with what a mechanism takes. For code that takes any attention.
template <Attention A>
void forward(const A& attention, const Inputs<typename A::Scalar>& inputs, Tokens<typename A::Scalar> out,
             Context& context) {
  if constexpr (requires { attention.forward(inputs, out, context); }) {
    attention.forward(inputs, out, context);
  } else {
    attention.forward(inputs, out);
  }
}

template <DifferentiableAttention A>
void forward(const A& attention, const Inputs<typename A::Scalar>& inputs, Tokens<typename A::Scalar> out,
             typename A::Saved& saved, Context& context) {
  if constexpr (requires { attention.forward(inputs, out, saved, context); }) {
    attention.forward(inputs, out, saved, context);
  } else {
    attention.forward(inputs, out, saved);
  }
}

template <DifferentiableAttention A>
void backward(const A& attention, const Inputs<typename A::Scalar>& inputs, Tokens<const typename A::Scalar> out,
              const typename A::Saved& saved, Tokens<const typename A::Scalar> grad_out,
              const InputGradients<typename A::Scalar>& grad_inputs, typename A::Parameters& grad_parameters,
              Context& context) {
  if constexpr (requires { attention.backward(inputs, out, saved, grad_out, grad_inputs, grad_parameters, context); }) {
    attention.backward(inputs, out, saved, grad_out, grad_inputs, grad_parameters, context);
  } else {
    attention.backward(inputs, out, saved, grad_out, grad_inputs, grad_parameters);
  }
}

template <StreamingAttention A>
typename A::State start(const A& attention, Index room = 0) {
  if constexpr (requires { attention.start(room); }) {
    return attention.start(room);
  } else {
    return attention.start();
  }
}

template <StreamingAttention A>
void extend(const A& attention, typename A::State& state, const Inputs<typename A::Scalar>& inputs,
            Tokens<typename A::Scalar> out, Context& context) {
  if constexpr (requires { attention.extend(state, inputs, out, context); }) {
    attention.extend(state, inputs, out, context);
  } else {
    attention.extend(state, inputs, out);
  }
}

/// Says in one sentence that a type is no attention, where a constrained template would list what failed.
template <class A>
constexpr void require_attention() {
  static_assert(
      Attention<A>,
      "nearfar: this type is not an Attention: it needs a type Scalar, heads() and forward(inputs, out) const.");
}

template <class A>
constexpr void require_differentiable_attention() {
  static_assert(DifferentiableAttention<A>,
                "nearfar: this type is not a DifferentiableAttention: besides Attention it needs types Saved and "
                "Parameters, which has for_each(visit), parameters(), also const, forward(inputs, out, saved) const "
                "and backward(inputs, out, saved, grad_out, grad_inputs, grad_parameters) const.");
}

template <class A>
constexpr void require_streaming_attention() {
  static_assert(
      StreamingAttention<A>,
      "nearfar: this type is not a StreamingAttention: besides Attention it needs a type State, start() const "
      "and extend(state, inputs, out) const.");
}

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
