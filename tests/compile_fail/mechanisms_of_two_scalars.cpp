// nearfar: the mechanisms of AnyAttention have one scalar type, and these have different ones.
#include <nearfar/any_attention.hpp>

#ifdef MUST_FAIL
using Scalar = double;
#else
using Scalar = float;
#endif

nearfar::Heads heads_of(const nearfar::AnyAttentionOf<nearfar::Softmax<float>, nearfar::Banded<Scalar>>& attention) {
  return attention.heads();
}
