// nearfar: attention is of float or double, and of no other scalar type.
#include <nearfar/attention.hpp>

#ifdef MUST_FAIL
using Scalar = int;
#else
using Scalar = float;
#endif

nearfar::Index queries(const nearfar::Inputs<Scalar>& inputs) { return inputs.query.rows(); }
