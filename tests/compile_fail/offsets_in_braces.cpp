// nearfar: a list in braces is gone before it is read: name it, as a std::vector or an array.
#include <nearfar/attention.hpp>

#include <vector>

nearfar::Inputs<float> batch_of(nearfar::Tokens<const float> x, const std::vector<nearfar::Index>& offsets) {
#ifdef MUST_FAIL
  return {.query = x, .key = x, .value = x, .query_offsets = {0, 5, offsets.back()}};
#else
  return {.query = x, .key = x, .value = x, .query_offsets = offsets};
#endif
}
