#pragma once

#include <string>
#include <vector>

// What attend.cpp gives, once for each instruction set.
#define DECLARE_UNIT(unit)                                     \
  namespace unit {                                             \
  std::string version_namespace();                             \
  std::vector<float> attend(const std::vector<float>& tokens); \
  }

DECLARE_UNIT(x86_64)
DECLARE_UNIT(x86_64_v3)
DECLARE_UNIT(x86_64_v4)

inline constexpr int token_count = 150;
inline constexpr int head_count = 2;
inline constexpr int head_dim = 20;
