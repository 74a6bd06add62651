#include "attend.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

namespace {

std::vector<float> tokens() {
  std::vector<float> values(static_cast<std::size_t>(token_count * head_count * head_dim));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i * i % 977));
  return values;
}

void expect_close(const std::vector<float>& actual, const std::vector<float>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) ASSERT_NEAR(actual[i], expected[i], 1e-5F) << "at " << i;
}

TEST(Link, UnitsOfDifferentInstructionSetsKeepTheirOwnNamespaces) {
  const std::set<std::string> namespaces{x86_64::version_namespace(), x86_64_v3::version_namespace(),
                                         x86_64_v4::version_namespace()};
  EXPECT_EQ(namespaces.size(), 3u);
}

TEST(Link, UnitsForAvx2AgreeWithTheBaseline) {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) GTEST_SKIP() << "This machine has no AVX2.";
  const std::vector<float> baseline = x86_64::attend(tokens());
  expect_close(x86_64_v3::attend(tokens()), baseline);
  EXPECT_EQ(x86_64::attend(tokens()), baseline);
}

TEST(Link, UnitsForAvx512AgreeWithTheBaseline) {
  for (const bool has : {__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512dq"),
                         __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512vl")}) {
    if (!has) GTEST_SKIP() << "This machine has no AVX-512.";
  }
  const std::vector<float> baseline = x86_64::attend(tokens());
  expect_close(x86_64_v4::attend(tokens()), baseline);
  EXPECT_EQ(x86_64::attend(tokens()), baseline);
}

}  // namespace
