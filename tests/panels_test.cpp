#include <nearfar/engine/softmax/panels.hpp>

#include <gtest/gtest.h>

namespace nearfar::test {
namespace {

using Panels = detail::Panels<float>;
constexpr Index lanes = detail::lanes<float>;

TEST(Panels, HoldEachQueryOnceAndNoneOfTwoBlocks) {
  for (const Index block : {Index{1}, Index{3}, lanes, Panels::width, Panels::width + 1, Index{64}, Index{1000}}) {
    for (const Index first : {Index{0}, Index{1}, block, Index{100}}) {
      for (const Index count : {Index{0}, Index{1}, Panels::width, Index{577}}) {
        detail::Scratch scratch;
        const Panels panels(scratch, first, count, block);
        Index next = 0;
        for (Index p = 0; p < panels.count(); ++p) {
          EXPECT_EQ(panels.begin(p), next);
          EXPECT_GE(panels.size(p), 1);
          EXPECT_LE(panels.size(p), Panels::width);
          next += panels.size(p);
          const Index begin = (first + panels.begin(p)) / block;
          const Index end = (first + next - 1) / block;
          if (block >= Panels::width) {
            EXPECT_EQ(begin, end) << "block " << block << ", first " << first << ", count " << count;
          } else if (next < count) {
            EXPECT_EQ((first + next) % block, 0) << "block " << block << ", first " << first << ", count " << count;
          }
        }
        EXPECT_EQ(next, count);
        EXPECT_EQ(panels.queries(), count);
      }
    }
  }
}

// Three vectors and one would leave the last panel little to share a broadcast number with.
TEST(Panels, CutABlockAsEvenlyAsVectorsAllow) {
  detail::Scratch scratch;
  const Index block = Panels::width + lanes;
  const Panels panels(scratch, 2 * block, 3 * block, block);
  EXPECT_EQ(panels.count(), 6);
  for (Index p = 0; p < panels.count(); ++p) EXPECT_EQ(panels.size(p), 2 * lanes);
}

TEST(Panels, HaveRoomForWhatFits) {
  for (const Index block : {Index{1}, lanes, 2 * lanes, Panels::width, Index{64}, Index{100}, Index{1000}}) {
    // Tiles begin with a block, or within one that is too large for them.
    for (const Index first : {Index{0}, 7 * block, 7 * block + (block == 1000 ? block - 1 : 0)}) {
      detail::Scratch scratch;
      const Index count = Panels::fitting(10, first, block);
      EXPECT_GE(count, first % block == 0 ? std::min(block, 10 * Panels::width) : 1);
      EXPECT_LE(Panels(scratch, first, count, block).count(), 10) << "block " << block << ", first " << first;
    }
  }
}

}  // namespace
}  // namespace nearfar::test
