#include <nearfar/engine/softmax/panel_keys.hpp>

#include "support/random.hpp"

#include <gtest/gtest.h>

#include <array>
#include <vector>

namespace nearfar::test {
namespace {

using T = float;
constexpr int vectors = detail::panel_vectors;
constexpr Index lanes = detail::lanes<T>;

/// A tile of keys, of which all but some stand one after another, and a panel of queries that sees them through a band.
struct Meeting {
  explicit Meeting(Random& random)
      : keys(scratch, 1, 1),
        queries(random.integer(1, 200)),
        band({random.integer(0, random.integer(0, 90)), random.integer(0, random.integer(0, 90))}, queries,
             random.integer(1, 300)),
        first(random.integer(0, queries - 1)),
        count(std::min<Index>(vectors * lanes, queries - first)) {
    const double hidden = random.unit() < 0.5 ? 0 : 0.4;
    Index position = random.integer(0, 200);
    for (Index room = random.integer(0, detail::KeyTile<T>::capacity); keys.count() < room; ++position) {
      if (random.unit() >= hidden) keys.append(&number, &number, position);
      // Whole vectors of queries may see no key between others that do.
      if (hidden > 0 && random.unit() < 0.05) position += random.integer(0, 2 * lanes);
    }
    keys.complete();
  }

  bool sees(Index query, Index place) const {
    const Index position = keys.position(place);
    return band.first(query) <= position && position < band.end(query);
  }

  detail::Scratch scratch;
  detail::KeyTile<T> keys;
  Index queries;
  Band band;
  Index first;
  Index count;
  T number = 1;
};

TEST(PanelKeys, StretchesHoldEachVisiblePairOnceAndWhatIsCalledVisibleToAllIs) {
  Random random(1);
  Index pairs = 0, stretches_of_one = 0, free_of_masks = 0;
  for (int repetition = 0; repetition < 2000; ++repetition) {
    const Meeting meeting(random);
    const detail::PanelKeys seen(meeting.keys, meeting.band, meeting.first, meeting.count);
    std::vector<std::array<int, vectors>> times(static_cast<std::size_t>(detail::KeyTile<T>::capacity));
    seen.for_each_stretch([&](auto count, int vector, Range keys, Range all) {
      EXPECT_EQ(keys.first % detail::group_rows, 0);
      EXPECT_EQ(keys.end % detail::group_rows, 0);
      EXPECT_LE(keys.first, all.first);
      EXPECT_LE(all.end, keys.end);
      stretches_of_one += count == 1;
      for (Index j = keys.first; j < keys.end; ++j) {
        for (int v = vector; v < vector + count; ++v) ++times[static_cast<std::size_t>(j)][static_cast<std::size_t>(v)];
      }
      for (Index j = all.first; j < std::min(all.end, meeting.keys.count()); ++j, ++free_of_masks) {
        for (Index i = vector * lanes; i < std::min((vector + count) * lanes, meeting.count); ++i) {
          ASSERT_TRUE(meeting.sees(meeting.first + i, j));
        }
      }
    });
    for (Index j = 0; j < meeting.keys.count(); ++j) {
      for (Index i = 0; i < meeting.count; ++i) {
        const auto v = static_cast<std::size_t>(i / lanes);
        const int met = times[static_cast<std::size_t>(j)][v];
        ASSERT_LE(met, 1);
        const Range any = seen.any(static_cast<int>(v));
        ASSERT_EQ(met == 1, any.first <= j && j < any.end);
        if (!meeting.sees(meeting.first + i, j)) continue;
        ASSERT_EQ(met, 1);
        ++pairs;
      }
    }
  }
  EXPECT_GT(pairs, 10000);
  EXPECT_GT(stretches_of_one, 100);
  EXPECT_GT(free_of_masks, 1000);
}

}  // namespace
}  // namespace nearfar::test
