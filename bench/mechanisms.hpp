#pragma once

#include "measure.hpp"

#include <nearfar/nearfar.hpp>

#include <memory>
#include <utility>

// nearfar's own rows: every mechanism forward, and backward.
namespace bench {

using nearfar::Heads;
using nearfar::Inputs;
using nearfar::Tokens;

template <class A>
auto forward_of(std::shared_ptr<const A> attention) {
  return [=](const Inputs<typename A::Scalar>& inputs, Tokens<typename A::Scalar> out) {
    return [=](nearfar::Context& context) { attention->forward(inputs, out, context); };
  };
}

/// Additive attention with scores that peers can have too.
inline nearfar::Additive<float> additive_attention(const nearfar::AdditiveOptions& options) {
  nearfar::Additive<float> attention(standard_heads, options);
  auto& parameters = attention.parameters();
  fill(parameters.w_q, parameters.w_q.rows(), parameters.w_q.cols(), 4);
  fill(parameters.w_k, parameters.w_k.rows(), parameters.w_k.cols(), 5);
  return attention;
}

/// What a peer's row must come to: the attention's forward pass.
template <nearfar::Attention A>
typename Subject<typename A::Scalar>::Prepare expected_of(A attention) {
  return forward_of(std::make_shared<const A>(std::move(attention)));
}

/// The first call goes forward before it goes backward, so that what is saved between the two counts as extra memory.
template <nearfar::DifferentiableAttention A>
auto backward_of(std::shared_ptr<const A> attention) {
  using T = typename A::Scalar;
  struct Pass {
    typename A::Saved saved;
    typename A::Parameters grad_parameters;
    bool is_saved = false;
  };
  return [=](const Inputs<T>& inputs, Tokens<T> out) {
    const auto pass = std::make_shared<Pass>(Pass{{}, attention->parameters(), false});
    Tensors<T>& data = tensors<T>(inputs.query.rows(), inputs.query.cols(), true);
    const auto rows = [&](nearfar::Matrix<T>& matrix) { return Tokens<T>(matrix).middle_rows(0, inputs.query.rows()); };
    const Tokens<const T> grad_out = rows(data.grad_out);
    const nearfar::InputGradients<T> grad{rows(data.grad_query), rows(data.grad_key), rows(data.grad_value)};
    return [=](nearfar::Context& context) {
      if (!pass->is_saved) attention->forward(inputs, out, pass->saved, context);
      pass->is_saved = true;
      attention->backward(inputs, out, pass->saved, grad_out, grad, pass->grad_parameters, context);
    };
  };
}

/// Adds a mechanism's rows: forward, and backward where it has that. `subject` says what is particular to it.
template <class A>
void add_attention(Suite& suite, A attention, Subject<typename A::Scalar> subject) {
  const auto shared = std::make_shared<const A>(std::move(attention));
  subject.heads = shared->heads();
  subject.family = "forward";
  subject.prepare = forward_of(shared);
  add(suite, subject);
  if constexpr (nearfar::DifferentiableAttention<A>) {
    if (subject.one_query) return;
    subject.family = "backward";
    subject.reach = {subject.reach.quick / 16, subject.reach.full / 4};
    subject.flops = [forward = subject.flops](Index n) { return 2.5 * forward(n); };
    subject.prepare = backward_of(shared);
    subject.tensors_moved = subject.tensors_moved_backward;
    subject.approximates_softmax = false;
    add(suite, subject);
  }
}

}  // namespace bench
