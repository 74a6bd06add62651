// nearfar needs infinities and NaN: build without -ffast-math and -ffinite-math-only.
#include <nearfar/version.hpp>
