// nearfar: a key_mask is a std::vector, array or span of std::uint8_t (not of bool), and offsets are one of
// nearfar::Index (std::ptrdiff_t): this is neither.
#include <nearfar/attention.hpp>

#include <vector>

#ifdef MUST_FAIL
using Offset = int;
#else
using Offset = nearfar::Index;
#endif

nearfar::Inputs<float> batch_of(nearfar::Tokens<const float> x, const std::vector<Offset>& offsets) {
  return {.query = x, .key = x, .value = x, .query_offsets = offsets};
}
