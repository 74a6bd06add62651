#include <nearfar/engine/softmax/key_tile.hpp>

#include <gtest/gtest.h>

#include <limits>
#include <vector>

// A tile of keys knows, without reading them again, whether its values are finite.

namespace nearfar::test {
namespace {

template <class T>
struct KeyTileOf : ::testing::Test {};
using Scalars = ::testing::Types<float, double>;
TYPED_TEST_SUITE(KeyTileOf, Scalars);

TYPED_TEST(KeyTileOf, NoticesAnyValueThatIsNotFinite) {
  using T = TypeParam;
  for (const Index value_dim : {Index{1}, Index{7}, Index{16}, Index{19}}) {
    for (const T bad : {std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()}) {
      for (Index c = 0; c < value_dim; ++c) {
        const std::vector<T> key(3, bad);  // keys may hold anything
        std::vector<T> value(static_cast<std::size_t>(value_dim), T(1));
        detail::Scratch scratch;
        detail::KeyTile<T> keys(scratch, 3, value_dim);
        keys.append(key.data(), value.data(), 0);
        EXPECT_TRUE(keys.values_are_finite());
        value[static_cast<std::size_t>(c)] = bad;
        keys.append(key.data(), value.data(), 1);
        EXPECT_FALSE(keys.values_are_finite()) << "value " << c << " of " << value_dim;
        keys.clear();
        EXPECT_TRUE(keys.values_are_finite());
        const Tokens<const T> key_row(key.data(), 1, 3, 3), value_row(value.data(), 1, value_dim, value_dim);
        keys.take(key_row, value_row, nullptr, {0, 1});
        EXPECT_FALSE(keys.values_are_finite()) << "value " << c << " of " << value_dim;
      }
    }
  }
}

}  // namespace
}  // namespace nearfar::test
