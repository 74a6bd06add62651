// nearfar: this type is not a StreamingAttention: besides Attention it needs a type State, start() const and
// extend(state, inputs, out) const.
#include <nearfar/attention.hpp>

struct Mechanism {
  using Scalar = float;
  struct State {};

  nearfar::Heads heads() const { return {}; }
  void forward(const nearfar::Inputs<float>&, nearfar::Tokens<float>) const {}
  void extend(State&, const nearfar::Inputs<float>&, nearfar::Tokens<float>) const {}
#ifndef MUST_FAIL
  State start() const { return {}; }
#endif
};

void use() { nearfar::require_streaming_attention<Mechanism>(); }
