// nearfar: the matrix and the attention have different scalar types.
#include <nearfar/tokens.hpp>

#ifdef MUST_FAIL
using Scalar = double;
#else
using Scalar = float;
#endif

nearfar::Tokens<const float> tokens_of(const nearfar::Matrix<Scalar>& matrix) { return matrix; }
