#include <nearfar/feature_map.hpp>

#include "support/compare.hpp"
#include "support/random.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace nearfar::test {
namespace {

/// x^2 + x / 2, as a user would write it.
struct Parabola {
  static constexpr std::string_view name = "parabola";
  double value(double x) const { return x * x + x / 2; }
  double derivative(double x) const { return 2 * x + 0.5; }
};
static_assert(FeatureMap<Parabola>);
static_assert(!FeatureMap<int>);

/// One that says that it does not take packets.
struct Slow : Parabola {
  static constexpr std::string_view name = "slow";
  static constexpr bool on_packets = false;
};

struct KnownMap {
  AnyFeatureMap map;
  std::function<long double(long double)> value;
};

const std::vector<KnownMap>& known_maps() {
  using Real = long double;
  static const std::vector<KnownMap> maps = {
      {feature_map::Elu{}, [](Real x) { return x > 0 ? x + 1 : std::exp(x); }},
      {feature_map::EluFlip{}, [](Real x) { return x < 0 ? 1 - x : std::exp(-x); }},
      {feature_map::Tanh{}, [](Real x) { return 2 / (1 + std::exp(-2 * x)); }},
      {feature_map::Relu{}, [](Real x) { return x > 0 ? x : 0; }},
      {feature_map::Sigmoid{}, [](Real x) { return 1 / (1 + std::exp(-x)); }},
      {feature_map::Softplus{}, [](Real x) { return std::log1p(std::exp(x)); }},
      {feature_map::Identity{}, [](Real x) { return x; }},
      {Parabola{}, [](Real x) { return x * x + x / 2; }},
      {Slow{}, [](Real x) { return x * x + x / 2; }},
  };
  return maps;
}

template <class T>
T value_at(const AnyFeatureMap& map, T x) {
  map.value(&x, 1, 1, 1, &x, 1);
  return x;
}

template <class T>
T derivative_at(const AnyFeatureMap& map, T x) {
  T one = 1;
  map.chain(&x, 1, 1, 1, &one, 1);
  return one;
}

template <class T>
void expect_values() {
  const double tolerance = 40 * static_cast<double>(std::numeric_limits<T>::epsilon());
  for (const KnownMap& known : known_maps()) {
    for (T x = T(-12); x <= T(12); x += T(0.03125)) {
      const double expected = static_cast<double>(known.value(x));
      EXPECT_NEAR(value_at(known.map, x), expected, tolerance * std::abs(expected)) << known.map.name() << " at " << x;
    }
  }
}

TEST(FeatureMap, HasTheValuesOfItsFormulaInDouble) { expect_values<double>(); }
TEST(FeatureMap, HasTheValuesOfItsFormulaInFloat) { expect_values<float>(); }

TEST(FeatureMap, HasTheDerivativeOfItsValue) {
  for (const KnownMap& known : known_maps()) {
    for (double x = -6.01; x < 6; x += 0.173) {
      const long double step = 1e-5L;
      const auto difference = (known.value(x + step) - known.value(x - step)) / (2 * step);
      EXPECT_NEAR(derivative_at(known.map, x), static_cast<double>(difference), 1e-8)
          << known.map.name() << " at " << x;
      EXPECT_NEAR(derivative_at(known.map, static_cast<float>(x)), static_cast<double>(difference), 1e-5)
          << known.map.name() << " in float at " << x;
    }
  }
}

TEST(FeatureMap, StaysFiniteFarOutAndPassesNaN) {
  for (const KnownMap& known : known_maps()) {
    for (const double x : {-1e5, -800.0, -90.0, 90.0, 800.0, 1e5}) {
      EXPECT_TRUE(std::isfinite(value_at(known.map, x))) << known.map.name() << " at " << x;
      EXPECT_TRUE(std::isfinite(derivative_at(known.map, x))) << known.map.name() << " at " << x;
      EXPECT_TRUE(std::isfinite(value_at(known.map, static_cast<float>(x)))) << known.map.name() << " at " << x;
      EXPECT_TRUE(std::isfinite(derivative_at(known.map, static_cast<float>(x)))) << known.map.name() << " at " << x;
    }
    EXPECT_TRUE(std::isnan(value_at(known.map, std::nan("")))) << known.map.name();
    EXPECT_TRUE(std::isnan(value_at(known.map, std::nanf("")))) << known.map.name();
  }
}

TEST(FeatureMap, GivesAnEntryTheSameBitsWhereverItStands) {
  Random random(1);
  const Matrix<float> x = random.matrix<float>(1, 131, 3);
  for (const KnownMap& known : known_maps()) {
    for (const Index cols : {1, 3, 16, 17, 100, 131}) {
      Matrix<float> value(1, cols), gradient = Matrix<float>::Ones(1, cols);
      known.map.value(x.data(), 0, 1, cols, value.data(), 0);
      known.map.chain(x.data(), 0, 1, cols, gradient.data(), 0);
      for (Index c = 0; c < cols; ++c) {
        ASSERT_EQ(value(0, c), value_at(known.map, x(0, c))) << known.map.name() << " column " << c << " of " << cols;
        ASSERT_EQ(gradient(0, c), derivative_at(known.map, x(0, c))) << known.map.name() << " column " << c;
      }
    }
  }
}

TEST(FeatureMap, KeepsToItsRowsAndColumns) {
  Random random(2);
  const Matrix<double> x = random.matrix<double>(4, 9);
  for (const KnownMap& known : known_maps()) {
    Matrix<double> y = Matrix<double>::Constant(5, 12, -7);
    known.map.value(x.data(), 9, 4, 9, y.data(), 12);
    for (Index i = 0; i < 5; ++i) {
      for (Index j = 0; j < 12; ++j) {
        const double expected = i < 4 && j < 9 ? value_at(known.map, x(i, j)) : -7;
        EXPECT_EQ(y(i, j), expected) << known.map.name() << " at (" << i << ", " << j << ")";
      }
    }
  }
}

TEST(FeatureMap, IsFoundByItsName) {
  for (const std::string name : {"elu", "elu_flip", "tanh", "relu", "sigmoid", "softplus", "identity"}) {
    EXPECT_EQ(feature_map_from_name(name).name(), name);
  }
  EXPECT_EQ(AnyFeatureMap(Parabola{}).name(), "parabola");
}

TEST(FeatureMap, OfUnknownNameIsAnErrorThatListsTheKnown) {
  try {
    feature_map_from_name("selu");
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(),
                 "nearfar::feature_map_from_name: unknown feature map \"selu\"; known are elu, elu_flip, tanh, relu, "
                 "sigmoid, softplus, identity.");
  }
}

}  // namespace
}  // namespace nearfar::test
