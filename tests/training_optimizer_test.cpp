// The steps of the training kit's optimiser.

#include "../examples/train/optimizer.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace {

using namespace train;

std::vector<double> rates(const AdamOptions& options, Index steps) {
  const Adam<double> adam({}, options);
  std::vector<double> all;
  for (Index step = 0; step < steps; ++step) all.push_back(adam.rate(step));
  return all;
}

TEST(TrainingAdam, HasARateThatWarmsUpAndIsZeroAfterTheLastStep) {
  EXPECT_EQ(rates({.rate = 8, .warm_up = 2, .steps = 6}, 8), (std::vector<double>{4, 8, 8, 6, 4, 2, 0, 0}));
  EXPECT_EQ(rates({.rate = 8, .steps = 4}, 5), (std::vector<double>{8, 6, 4, 2, 0}));
  EXPECT_EQ(rates({.rate = 8, .warm_up = 2, .steps = 2}, 3), (std::vector<double>{4, 8, 0}));
}

TEST(TrainingAdam, KeepsItsRateWhereTheStepsAreNotSaid) {
  EXPECT_EQ(rates({.rate = 8, .warm_up = 2}, 5), (std::vector<double>{4, 8, 8, 8, 8}));
  EXPECT_EQ(rates({}, 3), std::vector<double>(3, 1e-3));
}

TEST(TrainingAdam, MovesByItsRateAgainstTheGradientInTheFirstStepEvenIfItIsTheOnlyOne) {
  for (const AdamOptions& options : {AdamOptions{.rate = 0.5}, AdamOptions{.rate = 0.5, .steps = 1}}) {
    std::vector<double> value = {1, 2, 3}, gradient = {0.1, -4, 0};
    Adam<double> adam({{"x", value, gradient}}, options);
    EXPECT_NEAR(adam.step(0), std::hypot(0.1, 4), 1e-12);
    EXPECT_NEAR(value[0], 0.5, 1e-6);
    EXPECT_NEAR(value[1], 2.5, 1e-6);
    EXPECT_EQ(value[2], 3);
    EXPECT_EQ(gradient, std::vector<double>(3, 0));
  }
}

}  // namespace
