// nearfar: this type is not an Attention: it needs a type Scalar, heads() and forward(inputs, out) const.
#include <nearfar/attention.hpp>

struct Mechanism {
  using Scalar = float;
  nearfar::Heads heads() const { return {}; }
#ifdef MUST_FAIL
  void forward(const nearfar::Inputs<float>&) const {}
#else
  void forward(const nearfar::Inputs<float>&, nearfar::Tokens<float>) const {}
#endif
};

void use() { nearfar::require_attention<Mechanism>(); }
