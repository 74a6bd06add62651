#include <nearfar/detail/lookahead.hpp>
#include <nearfar/detail/simd.hpp>

#include <gtest/gtest.h>

#include <limits>
#include <vector>

// What stands on Eigen's packets: sums across lanes and selections; and how many steps fetch rows ahead.

namespace nearfar::test {
namespace {

template <class T>
struct Simd : ::testing::Test {};
using Scalars = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Simd, Scalars);

// Of Count packets and, one after the other, its halves.
template <class T, int Count>
void expect_sums_of_lanes() {
  constexpr Index width = detail::lanes<T>;
  T numbers[Count * width], sums[width];
  for (Index i = 0; i < Count * width; ++i) numbers[i] = static_cast<T>(i * i % 101);
  detail::Packet<T> packets[Count];
  for (Index p = 0; p < Count; ++p) packets[p] = detail::ploadu<detail::Packet<T>>(numbers + p * width);
  detail::pstoreu(sums, detail::Packet<T>(detail::sum_lanes<Count>(packets)));
  for (Index i = 0; i < width; ++i) {
    T sum = 0;
    for (Index lane = 0; lane < width; ++lane) sum += numbers[i % Count * width + lane];
    EXPECT_EQ(sums[i], sum) << "lane " << i << " of " << Count << " packets";
  }
  if constexpr (Count > 1) expect_sums_of_lanes<T, Count / 2>();
}

TYPED_TEST(Simd, SumsTheLanesOfEachPacket) { expect_sums_of_lanes<TypeParam, detail::lanes<TypeParam>>(); }

TYPED_TEST(Simd, SelectsWhereTheFirstIsLess) {
  using T = TypeParam;
  using P = detail::Packet<T>;
  constexpr Index width = detail::lanes<T>;
  const P lane = detail::plset<P>(T(0));
  const P hidden = detail::pset1<P>(-std::numeric_limits<T>::infinity());
  const P nan = detail::pset1<P>(std::numeric_limits<T>::quiet_NaN());
  for (Index place = -1; place <= width; ++place) {
    T selected[width];
    detail::pstoreu(selected, P(detail::select_less(lane, detail::pset1<P>(static_cast<T>(place)), nan, hidden)));
    for (Index i = 0; i < width; ++i) {
      EXPECT_EQ(selected[i] != selected[i], i < place) << "lane " << i << " of " << place;
      EXPECT_EQ(selected[i] == -std::numeric_limits<T>::infinity(), i >= place) << "lane " << i << " of " << place;
    }
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
    ahead();
  }
  EXPECT_TRUE(ahead.done());
}

TEST(Lookahead, GoesOnWithWhatIsLaterAndStillLater) {
  const std::vector<float> rows(10 * 100);
  detail::Lookahead first, later, last;
  for (detail::Lookahead* ahead : {&first, &later, &last}) ahead->add(rows.data(), 100, 10, 64);
  first.and_then(&later);
  later.and_then(&last);
  for (Index step = 0; step < 30; ++step) {
    EXPECT_EQ(first.done(), step >= 10) << "after step " << step;
    EXPECT_EQ(later.done(), step >= 20) << "after step " << step;
    EXPECT_FALSE(last.done()) << "after step " << step;
    first();
  }
  EXPECT_TRUE(last.done());
  first();
}

}  // namespace
}  // namespace nearfar::test
