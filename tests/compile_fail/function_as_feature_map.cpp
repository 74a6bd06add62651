// nearfar: a feature map needs value(x) and derivative(x) const, for float and double, and a static name: it is no
// function, and one of a name is feature_map_from_name(name).
#include <nearfar/linear.hpp>

#ifdef MUST_FAIL
nearfar::LinearOptions options() {
  return {.feature_maps = {[](auto x) { return x * x; }}};
}
#else
nearfar::LinearOptions options() { return {.feature_maps = {nearfar::feature_map_from_name("relu")}}; }
#endif
