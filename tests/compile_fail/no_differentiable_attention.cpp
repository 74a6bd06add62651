// nearfar: this type is not a DifferentiableAttention: besides Attention it needs types Saved and Parameters, which has
// for_each(visit), parameters(), also const, forward(inputs, out, saved) const and backward(inputs, out, saved,
// grad_out, grad_inputs, grad_parameters) const.
#include <nearfar/attention.hpp>

struct Mechanism {
  using Scalar = float;
  using Parameters = nearfar::NoParameters;
  struct Saved {};
  using Read = nearfar::Tokens<const float>;
  using Write = nearfar::Tokens<float>;

  nearfar::Heads heads() const { return {}; }
  const Parameters& parameters() const { return parameters_; }
  void forward(const nearfar::Inputs<float>&, Write) const {}
  void forward(const nearfar::Inputs<float>&, Write, Saved&) const {}
#ifndef MUST_FAIL
  void backward(const nearfar::Inputs<float>&, Read, const Saved&, Read, const nearfar::InputGradients<float>&,
                Parameters&) const {}
#endif

 private:
  Parameters parameters_;
};

void use() { nearfar::require_differentiable_attention<Mechanism>(); }
