// nearfar: a feature map needs value(x) and derivative(x) const, for float and double, and a static name: it is no
// function, and one of a name is feature_map_from_name(name).
#include <nearfar/linear.hpp>

struct Square {
#ifndef MUST_FAIL
  static constexpr std::string_view name = "square";
#endif
  double value(double x) const { return x * x; }
  double derivative(double x) const { return 2 * x; }
};

nearfar::LinearOptions options() { return {.feature_maps = {Square{}}}; }
