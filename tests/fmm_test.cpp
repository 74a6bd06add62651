#include <nearfar/fmm.hpp>

#include "support/compare.hpp"
#include "support/sample.hpp"

#include <gtest/gtest.h>

#include <string>

namespace nearfar::test {
namespace {

const Heads heads{.query = 4, .key_value = 2, .dim = 5};

/// Parameters of the shapes that the options ask for, all different.
template <class T>
void randomize(FmmParameters<T>& parameters) {
  Random random(1);
  parameters.for_each([&](const std::string&, Matrix<T>& m) { m = random.matrix<T>(m.rows(), m.cols()); });
}

Matrix<double> sigmoid(const Matrix<double>& x) { return ((-x.array()).exp() + 1).inverse(); }

TEST(Fmm, BeginsWithTheWeightsOfThePaper) {
  Fmm<double> fmm(heads, {.feature_maps = {feature_map::Elu{}, feature_map::EluFlip{}}});
  std::string names;
  fmm.parameters().for_each([&](const std::string& name, const Matrix<double>& matrix) {
    names += name + " ";
    EXPECT_EQ(matrix, Matrix<double>::Constant(4, 5, name == "w_near" ? 0 : 1)) << name;
  });
  EXPECT_EQ(names, "w_near w_far_0 w_far_1 ");
}

TEST(Fmm, PassesWeightsThroughTheSigmoid) {
  const auto sample = random_sample<double>(heads, 40, 2);
  Fmm<double> gated(heads, {.window = {3, 2}});
  Fmm<double> plain(heads, {.window = {3, 2}, .gate = Gate::identity});
  randomize(gated.parameters());
  plain.parameters() = gated.parameters();
  plain.parameters().for_each([](const std::string&, Matrix<double>& weights) { weights = sigmoid(weights); });
  EXPECT_TRUE(close(run_forward(gated, sample), run_forward(plain, sample), 1e-14));
}

TEST(Fmm, IsLinearInItsWeights) {
  const auto sample = random_sample<double>(heads, 40, 3);
  Fmm<double> fmm(heads, {.feature_maps = {feature_map::Elu{}, feature_map::Tanh{}}, .gate = Gate::identity});
  randomize(fmm.parameters());
  const FmmParameters<double> all = fmm.parameters();
  const Matrix<double> whole = run_forward(fmm, sample);
  Matrix<double> sum = Matrix<double>::Zero(40, heads.out_cols());
  for (const std::string one : {"w_near", "w_far_0", "w_far_1"}) {
    fmm.parameters() = all;
    fmm.parameters().for_each([&](const std::string& name, Matrix<double>& weights) {
      if (name != one) weights.setZero();
    });
    sum += run_forward(fmm, sample);
  }
  EXPECT_TRUE(close(sum, whole, 1e-14));
}

/// The gradients of an Fmm whose weights per feature say the same as `narrow` weights.
Gradients<double, FmmParameters<double>> spread(const Fmm<double>& narrow, const Sample<double>& sample,
                                                const Matrix<double>& grad_out) {
  FmmOptions options = narrow.options();
  options.weights = BlendWeights::per_feature;
  Fmm<double> wide(heads, options);
  const auto replicate = [](const Matrix<double>& w) -> Matrix<double> {
    return w.replicate(4 / w.rows(), 5 / w.cols());
  };
  wide.parameters().near = replicate(narrow.parameters().near);
  for (std::size_t r = 0; r < wide.parameters().far.size(); ++r) {
    wide.parameters().far[r] = replicate(narrow.parameters().far[r]);
  }
  return run_backward(wide, sample, grad_out);
}

TEST(Fmm, WithFewerWeightsIsThatWithEqualWeightsAndSumsTheirGradients) {
  auto sample = random_sample<double>(heads, 60, 4);
  sample.key_mask = Random(5).mask(60, 0.2);
  const auto grad_out = Random(6).matrix<double>(60, heads.out_cols());
  for (const BlendWeights weights : {BlendWeights::per_head, BlendWeights::shared}) {
    Fmm<double> fmm(heads, {.window = {4, 4}, .causal = true, .weights = weights});
    randomize(fmm.parameters());
    const Index rows = weights == BlendWeights::shared ? 1 : 4;
    ASSERT_EQ(fmm.parameters().near.size(), rows);
    const auto expected = spread(fmm, sample, grad_out);
    const auto actual = run_backward(fmm, sample, grad_out);
    EXPECT_TRUE(same_bits(actual.out, expected.out));
    EXPECT_TRUE(same_bits(actual.query, expected.query));
    EXPECT_TRUE(same_bits(actual.key, expected.key));
    EXPECT_TRUE(same_bits(actual.value, expected.value));
    const auto sums = [&](const Matrix<double>& m) -> Matrix<double> {
      if (rows == 1) return Matrix<double>::Constant(1, 1, m.sum());
      return m.rowwise().sum();
    };
    EXPECT_TRUE(close(actual.parameters.near, sums(expected.parameters.near), 1e-13));
    EXPECT_TRUE(close(actual.parameters.far[0], sums(expected.parameters.far[0]), 1e-13));
  }
}

TEST(Fmm, AddsTheGradientsOfItsWeights) {
  const auto sample = random_sample<double>(heads, 30, 7);
  const auto grad_out = Random(8).matrix<double>(30, heads.out_cols());
  Fmm<double> fmm(heads, {.window = {4, 4}});
  auto once = run_backward(fmm, sample, grad_out);
  FmmParameters<double> twice = once.parameters;
  Matrix<double> out = once.out;
  Fmm<double>::Saved saved;
  fmm.forward(sample.inputs(), out, saved);
  fmm.backward(sample.inputs(), out, saved, grad_out, {once.query, once.key, once.value}, twice);
  EXPECT_TRUE(close(twice.near, Matrix<double>(2 * once.parameters.near), 1e-14));
  EXPECT_TRUE(close(twice.far[0], Matrix<double>(2 * once.parameters.far[0]), 1e-14));
}

TEST(Fmm, GradientsDoNotDependOnThreads) {
  const auto sample = random_sample<float>(heads, 3000, 9);
  const auto grad_out = Random(10).matrix<float>(3000, heads.out_cols());
  const Fmm<float> fmm(heads, {.window = {4, 4}});
  const auto expected = run_backward(fmm, sample, grad_out, 1);
  for (const int threads : {2, 8}) {
    const auto actual = run_backward(fmm, sample, grad_out, threads);
    EXPECT_TRUE(same_bits(actual.out, expected.out));
    EXPECT_TRUE(same_bits(actual.query, expected.query));
    EXPECT_TRUE(same_bits(actual.parameters.near, expected.parameters.near));
    EXPECT_TRUE(same_bits(actual.parameters.far[0], expected.parameters.far[0]));
  }
}

template <class Action>
std::string message(Action&& action) {
  try {
    action();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST(Fmm, RefusesBadOptions) {
  const auto make = [](const FmmOptions& options) { return message([&] { Fmm<float> fmm(heads, options); }); };
  EXPECT_EQ(make({.window = {-1, 0}}), "nearfar::Fmm: window.left must be 0 or more, but is -1.");
  EXPECT_EQ(make({.feature_maps = {}}), "nearfar::Fmm: feature_maps must hold at least one map, but holds 0.");
  EXPECT_EQ(make({.eps = -1}), "nearfar::Fmm: eps must be finite and 0 or more, but is -1.");
  EXPECT_EQ(make({.scale = 0.0}), "nearfar::Fmm: scale must be positive and finite, but is 0.");
}

TEST(Fmm, RefusesWeightsOfAnotherShape) {
  const auto sample = random_sample<float>(heads, 3, 11);
  Fmm<float> fmm(heads);
  fmm.parameters().far[0].resize(4, 1);
  EXPECT_EQ(message([&] { run_forward(fmm, sample); }), "nearfar::Fmm: w_far_0 must be 4 x 5, but is 4 x 1.");
  fmm.parameters().far.clear();
  EXPECT_EQ(message([&] { run_forward(fmm, sample); }),
            "nearfar::Fmm: w_far must be 1 matrices, one a feature map, but is 0.");
}

}  // namespace
}  // namespace nearfar::test
