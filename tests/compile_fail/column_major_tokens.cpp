// nearfar: tokens are row-major, one row a token: this matrix is column-major.
#include <nearfar/tokens.hpp>

#ifdef MUST_FAIL
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor>;
#else
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
#endif

nearfar::Tokens<const float> tokens_of(const Matrix& matrix) { return matrix; }
