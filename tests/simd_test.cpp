#include <nearfar/detail/lookahead.hpp>
#include <nearfar/detail/simd.hpp>

#include <gtest/gtest.h>

#include <vector>

// What stands on Eigen's packets: sums across lanes, and the pace at which rows are fetched ahead.

namespace nearfar::test {
namespace {

template <class T>
struct Simd : ::testing::Test {};
using Scalars = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Simd, Scalars);

TYPED_TEST(Simd, SumsEachOfAsManyPacketsAsOneHasLanes) {
  using T = TypeParam;
  constexpr Index width = detail::lanes<T>;
  T numbers[width * width], sums[width];
  for (Index i = 0; i < width * width; ++i) numbers[i] = static_cast<T>(i * i % 101);
  detail::Packet<T> packets[width];
  for (Index p = 0; p < width; ++p) packets[p] = detail::ploadu<detail::Packet<T>>(numbers + p * width);
  detail::pstoreu(sums, detail::Packet<T>(detail::sum_lanes(packets)));
  for (Index p = 0; p < width; ++p) {
    T sum = 0;
    for (Index lane = 0; lane < width; ++lane) sum += numbers[p * width + lane];
    EXPECT_EQ(sums[p], sum) << "packet " << p;
  }
}

TEST(Lookahead, CountsItsSteps) {
  const std::vector<float> rows(10 * 100);
  detail::Lookahead ahead;
  ahead.add(rows.data(), 100, 10, 64);
  EXPECT_EQ(ahead.steps(), 10);
  ahead.add(rows.data(), 100, 5, 65);
  EXPECT_EQ(ahead.steps(), 10 + 2 * 5);
  for (Index step = 1; step <= 20; ++step) {
    EXPECT_FALSE(ahead.done()) << "before step " << step;
    ahead.step();
  }
  EXPECT_TRUE(ahead.done());
}

}  // namespace
}  // namespace nearfar::test
