// nearfar: tokens are a matrix in memory, not an expression: evaluate it into a matrix first.
#include <nearfar/tokens.hpp>

#ifdef MUST_FAIL
nearfar::Index rows_of(const nearfar::Matrix<float>& a) { return nearfar::Tokens<const float>(a + a).rows(); }
#else
nearfar::Index rows_of(const nearfar::Matrix<float>& a) { return nearfar::Tokens<const float>((a + a).eval()).rows(); }
#endif
