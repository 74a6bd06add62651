#pragma once

#include <cmath>
#include <cstdio>
#include <string>

// Numbers as the tables show them.
namespace bench {

template <class... Parts>
std::string text(const char* format, Parts... parts) {
  char buffer[128];
  std::snprintf(buffer, sizeof buffer, format, parts...);
  return buffer;
}

/// Three figures and a unit.
inline std::string scaled(double value, const char* unit) {
  const int decimals = value < 10 ? 2 : value < 100 ? 1 : 0;
  return text("%.*f%s", decimals, value, unit);
}

inline std::string time_text(double seconds) {
  if (seconds < 1e-3) return scaled(seconds * 1e6, "us");
  if (seconds < 1) return scaled(seconds * 1e3, "ms");
  return scaled(seconds, "s");
}

inline std::string bytes_text(double bytes) {
  if (bytes < 1024.0 * 1024) return text("%.0fK", std::ceil(bytes / 1024));
  if (bytes < 1024.0 * 1024 * 1024) return scaled(bytes / (1024.0 * 1024), "M");
  return scaled(bytes / (1024.0 * 1024 * 1024), "G");
}

inline std::string ratio_text(double ratio) { return scaled(ratio, "x"); }

}  // namespace bench
