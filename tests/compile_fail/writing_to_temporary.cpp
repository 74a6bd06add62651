// nearfar: the result would be written into a matrix that is gone: name it.
#include <nearfar/softmax.hpp>

using nearfar::Matrix;

#ifdef MUST_FAIL
void attend(const nearfar::Softmax<float>& attention, const nearfar::Inputs<float>& inputs) {
  attention.forward(inputs, Matrix<float>(3, 4));
}
#else
void attend(const nearfar::Softmax<float>& attention, const nearfar::Inputs<float>& inputs) {
  Matrix<float> out(3, 4);
  attention.forward(inputs, out);
  attention.forward(inputs, out.topRows(3));
  attention.forward(inputs, Eigen::Map<Matrix<float>>(out.data(), 3, 4));
}
#endif
