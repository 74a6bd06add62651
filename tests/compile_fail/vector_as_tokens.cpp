// nearfar: tokens are a row-major Eigen matrix or, of any other memory, Tokens(data, rows, cols, stride): this is
// neither.
#include <nearfar/attention.hpp>

#include <vector>

nearfar::Index rows_of(const std::vector<float>& x, [[maybe_unused]] nearfar::Index cols) {
#ifdef MUST_FAIL
  const nearfar::Tokens<const float> tokens = x;
#else
  const nearfar::Tokens<const float> tokens(x.data(), static_cast<nearfar::Index>(x.size()) / cols, cols, cols);
#endif
  return tokens.rows();
}
