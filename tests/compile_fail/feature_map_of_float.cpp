// nearfar: a feature map needs value(x) and derivative(x) const, for float and double, and a static name: it is no
// function, and one of a name is feature_map_from_name(name).
#include <nearfar/linear.hpp>

#ifdef MUST_FAIL
using Number = float;  // which would take double's numbers and round them
#else
using Number = double;
#endif

struct Square {
  static constexpr std::string_view name = "square";
  Number value(Number x) const { return x * x; }
  Number derivative(Number x) const { return 2 * x; }
};

nearfar::LinearOptions options() { return {.feature_maps = {Square{}}}; }
