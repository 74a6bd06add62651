// nearfar needs std::min and std::max, and not macros of their names: define NOMINMAX before windows.h.
#ifdef MUST_FAIL
#define max(a, b) ((a) > (b) ? (a) : (b))
#endif
#include <nearfar/version.hpp>
