// nearfar: the result cannot be written into a const matrix.
#include <nearfar/tokens.hpp>

#ifdef MUST_FAIL
using Out = const nearfar::Matrix<float>;
#else
using Out = nearfar::Matrix<float>;
#endif

nearfar::Tokens<float> tokens_of(Out& out) { return out; }
