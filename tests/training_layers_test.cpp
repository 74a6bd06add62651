// The layers of the training kit against finite differences, in double.

#include "../examples/train/model.hpp"
#include "../examples/train/optimizer.hpp"

#include <nearfar/nearfar.hpp>

#include <gtest/gtest.h>

#include <functional>

namespace {

using namespace train;
using nearfar::Context;

constexpr nearfar::Heads heads{.query = 2, .key_value = 2, .dim = 3};
constexpr Index width = 6;
const std::vector<Index> offsets = {0, 5, 5, 12};  // an empty sequence among them
constexpr Index rows = 12;

Matrix<double> random_matrix(Index row_count, Index cols, Random& random) {
  return Parameter<double>(row_count, cols, 1.0, random).value;
}

/// Every numbers' share of `gradient` is that of `function` by central differences.
void expect_gradient(const std::string& name, std::span<double> numbers, std::span<const double> gradient,
                     const std::function<double()>& function) {
  ASSERT_EQ(numbers.size(), gradient.size()) << name;
  constexpr double step = 1e-5;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const double number = numbers[i];
    numbers[i] = number + step;
    const double above = function();
    numbers[i] = number - step;
    const double below = function();
    numbers[i] = number;
    const double expected = (above - below) / (2 * step);
    EXPECT_NEAR(gradient[i], expected, 1e-7 * (1 + std::abs(expected))) << name << ", number " << i;
  }
}

std::span<double> numbers_of(Matrix<double>& matrix) {
  return {matrix.data(), static_cast<std::size_t>(matrix.size())};
}

/// Checks grad_x and the gradients of all parameters of a layer, with the sum of y * `weights` as what is derived.
template <class Layer, class Forward, class Backward>
void expect_gradients(Layer& layer, Matrix<double> x, Index y_rows, Index y_cols, Forward&& forward,
                      Backward&& backward) {
  Random random({7});
  const Matrix<double> weights = random_matrix(y_rows, y_cols, random);
  const auto loss = [&] { return forward(Tokens<const double>(x)).matrix().cwiseProduct(weights).sum(); };
  loss();
  const Matrix<double> grad_x = backward(Tokens<const double>(weights)).matrix();
  expect_gradient("x", numbers_of(x), {grad_x.data(), static_cast<std::size_t>(grad_x.size())}, loss);
  if constexpr (requires { layer.for_each("layer", [](auto&&...) {}); }) {
    Index parameters = 0;
    layer.for_each("layer", [&](const std::string& name, Matrix<double>& value, Matrix<double>& gradient) {
      expect_gradient(name, numbers_of(value), numbers_of(gradient), loss);
      ++parameters;
    });
    EXPECT_GT(parameters, 0);
  }
}

class TrainingLayers : public testing::Test {
 protected:
  Random random{1};
  Matrix<double> x = random_matrix(rows, width, random);
  Context context{1};
};

TEST_F(TrainingLayers, DenseHasTheGradientOfItsForward) {
  Dense<double> layer(width, 4, random);
  expect_gradients(
      layer, x, rows, 4, [&](auto v) { return layer.forward(v); }, [&](auto g) { return layer.backward(g); });
}

TEST_F(TrainingLayers, LayerNormHasTheGradientOfItsForward) {
  LayerNorm<double> layer(width);
  layer.for_each("", [&](const std::string&, Matrix<double>& value, Matrix<double>&) {
    value += random_matrix(1, width, random);
  });
  expect_gradients(
      layer, x, rows, width, [&](auto v) { return layer.forward(v); }, [&](auto g) { return layer.backward(g); });
}

TEST_F(TrainingLayers, LayerNormGivesRowsOfMeanZeroAndDeviationOne) {
  LayerNorm<double> layer(width);
  const Matrix<double> y = layer.forward(Tokens<const double>(x)).matrix();
  for (Index i = 0; i < rows; ++i) {
    EXPECT_NEAR(y.row(i).mean(), 0, 1e-12);
    EXPECT_NEAR(y.row(i).squaredNorm() / width, 1, 1e-3);
  }
}

TEST_F(TrainingLayers, GeluHasTheGradientOfItsForward) {
  Gelu<double> layer(width);
  expect_gradients(
      layer, 3 * x, rows, width, [&](auto v) { return layer.forward(v); }, [&](auto g) { return layer.backward(g); });
}

TEST_F(TrainingLayers, GeluIsCloseToTheProductWithTheNormalDistribution) {
  Gelu<double> layer(1);
  for (const double number : {-6.0, -1.0, -0.3, 0.0, 0.5, 2.0, 7.0}) {
    const Matrix<double> one = Matrix<double>::Constant(1, 1, number);
    EXPECT_NEAR(layer.forward(Tokens<const double>(one))(0, 0), number * 0.5 * std::erfc(-number / std::sqrt(2.0)),
                1e-3);
  }
}

TEST_F(TrainingLayers, DropoutHasTheGradientOfItsForward) {
  Dropout<double> layer(width, 0.4);
  Matrix<double> changed;
  expect_gradients(
      layer, x, rows, width,
      [&](auto v) {
        Random same({3});
        changed = v.matrix();
        return layer.forward(changed, &same);
      },
      [&](auto g) { return layer.backward(g); });
}

TEST_F(TrainingLayers, DropoutKeepsTheMeanAndDrawsAnewEachTime) {
  constexpr Index many = 4000;
  Dropout<double> layer(width, 0.25);
  Matrix<double> first = Matrix<double>::Ones(many, width), second = first;
  layer.forward(first, &random);
  layer.forward(second, &random);
  const auto kept = static_cast<double>((first.array() > 0).count()) / (many * width);
  const auto kept_twice = static_cast<double>((first.array() * second.array() > 0).count()) / (many * width);
  EXPECT_NEAR(kept, 0.75, 0.015);
  EXPECT_NEAR(kept_twice, 0.75 * 0.75, 0.015);
  EXPECT_NEAR(first.mean(), 1, 0.02);
}

TEST_F(TrainingLayers, DropoutWithoutRandomNumbersChangesNothing) {
  Dropout<double> layer(width, 0.4);
  const Matrix<double> before = x;
  EXPECT_EQ(layer.forward(x, nullptr).data(), x.data());
  EXPECT_EQ(x, before);
  EXPECT_THROW(Dropout<double>(width, 1.0), std::invalid_argument);
}

TEST_F(TrainingLayers, MeanPoolingHasTheGradientOfItsForward) {
  MeanPooling<double> layer(width);
  expect_gradients(
      layer, x, 3, width, [&](auto v) { return layer.forward(v, offsets); }, [&](auto g) { return layer.backward(g); });
}

TEST_F(TrainingLayers, FeedForwardHasTheGradientOfItsForward) {
  FeedForward<double> layer(width, 8, 4, 0.3, random);
  expect_gradients(
      layer, x, rows, 4,
      [&](auto v) {
        Random same({3});
        return layer.forward(v, &same);
      },
      [&](auto g) { return layer.backward(g); });
}

TEST_F(TrainingLayers, AttentionLayersHaveTheGradientOfTheirForward) {
  for (const char* line : {"softmax:causal", "fmm:left=2,right=1,maps=elu+tanh", "additive"}) {
    SCOPED_TRACE(line);
    using Attention = nearfar::AnyAttention<double>;
    AttentionLayer<Attention> layer(width, Attention(heads, line), random);
    expect_gradients(
        layer, x, rows, width, [&](auto v) { return layer.forward(v, offsets, context); },
        [&](auto g) { return layer.backward(g, context); });
  }
}

TEST_F(TrainingLayers, ABlockHasTheGradientOfItsForward) {
  Block<nearfar::Softmax<double>> layer(width, nearfar::Softmax<double>(heads), 8, 0.2, random);
  expect_gradients(
      layer, x, rows, width,
      [&](auto v) {
        Random same({3});
        return layer.forward(v, offsets, &same, context);
      },
      [&](auto g) { return layer.backward(g, context); });
}

/// Attention of every token to itself alone, that has no more than DifferentiableAttention asks for.
struct Itself {
  using Scalar = double;
  using Parameters = nearfar::NoParameters;
  struct Saved {};

  nearfar::Heads heads() const { return ::heads; }
  Parameters parameters() const { return {}; }
  void forward(const nearfar::Inputs<double>& inputs, Tokens<double> out) const {
    out.matrix() = inputs.value.matrix();
  }
  void forward(const nearfar::Inputs<double>& inputs, Tokens<double> out, Saved&) const { forward(inputs, out); }
  void backward(const nearfar::Inputs<double>&, Tokens<const double>, const Saved&, Tokens<const double> grad_out,
                const nearfar::InputGradients<double>& grad, Parameters&) const {
    grad.query.matrix().setZero();
    grad.key.matrix().setZero();
    grad.value.matrix() = grad_out.matrix();
  }
};

TEST_F(TrainingLayers, ABlockTakesAMechanismWithoutAContext) {
  Block<Itself> layer(width, Itself{}, 8, 0, random);
  expect_gradients(
      layer, x, rows, width, [&](auto v) { return layer.forward(v, offsets, nullptr, context); },
      [&](auto g) { return layer.backward(g, context); });
}

TEST_F(TrainingLayers, CrossEntropyHasTheGradientOfItsSumAndLeavesRowsWithoutTargetOut) {
  Matrix<double> logits = 4 * random_matrix(4, 3, random), grad(4, 3), unused(4, 3);
  logits.row(1).array() += 1000;
  const std::vector<int> targets = {2, 0, no_target, 1};
  const auto loss = [&](Matrix<double>& to) {
    return cross_entropy<double>(Tokens<const double>(logits), targets, 0.5, to);
  };
  EXPECT_EQ(loss(grad).targets, 3);
  expect_gradient("logits", numbers_of(logits), numbers_of(grad), [&] { return 0.5 * loss(unused).cross_entropy; });
  EXPECT_EQ(grad.row(2).squaredNorm(), 0);
}

TEST_F(TrainingLayers, CrossEntropyCountsTheRowsWhoseLargestLogitIsTheTarget) {
  const Matrix<double> logits{{0, 5}, {5, 0}, {1, 2}};
  Matrix<double> grad(3, 2);
  const Loss loss = cross_entropy<double>(Tokens<const double>(logits), std::vector<int>{1, 1, 1}, 1.0, grad);
  EXPECT_EQ(loss.correct, 2);
  EXPECT_NEAR(loss.cross_entropy, std::log1p(std::exp(-5)) + std::log1p(std::exp(5)) + std::log1p(std::exp(-1)), 1e-12);
}

TEST_F(TrainingLayers, AModelHasTheGradientOfItsForwardPooledOrNot) {
  using Model = Model<nearfar::Linear<double>>;
  for (const bool pool : {false, true}) {
    SCOPED_TRACE(pool ? "pooled" : "a row a token");
    Batch batch;
    for (int i = 0; i < 9; ++i) {
      batch.tokens.push_back(i * 5 % 4);
      if (i == 3 || i == 8) batch.end_sequence();
    }
    batch.targets = pool ? std::vector{1, 2} : std::vector{1, 0, no_target, 2, 2, 1, 0, 0, 1};
    Model model({.vocabulary = 4, .max_length = 6, .classes = 3, .pool = pool, .width = width, .feed_forward = 5},
                nearfar::Linear<double>(heads), random_for(1, Purpose::weights));
    Matrix<double> grad(9, 3);
    const auto loss = [&] {
      Random same({3});
      const auto logits = model.forward(batch, &same, context);
      const auto to = Tokens<double>(grad).middle_rows(0, logits.rows());
      return cross_entropy<double>(logits, batch.targets, 1.0, to).cross_entropy;
    };
    const Index logit_rows = pool ? 2 : 9;
    loss();
    model.backward(Tokens<const double>(grad).middle_rows(0, logit_rows), context);
    for (const Variable<double>& variable : variables_of(model)) {
      expect_gradient(variable.name, variable.value, variable.gradient, loss);
    }
  }
}

TEST_F(TrainingLayers, GradientsOfAModelAddUpOverThePiecesOfABatch) {
  FeedForward<double> whole(width, 8, 4, 0, random);
  FeedForward<double> pieces = whole;
  const Matrix<double> grad = random_matrix(rows, 4, random);
  whole.forward(Tokens<const double>(x), nullptr);
  whole.backward(Tokens<const double>(grad));
  for (const Index first : {0, 6}) {
    pieces.forward(Tokens<const double>(x).middle_rows(first, 6), nullptr);
    pieces.backward(Tokens<const double>(grad).middle_rows(first, 6));
  }
  std::vector<Matrix<double>> expected;
  whole.for_each("", [&](const std::string&, Matrix<double>&, Matrix<double>& g) { expected.push_back(g); });
  auto next = expected.begin();
  pieces.for_each("", [&](const std::string& name, Matrix<double>&, Matrix<double>& g) {
    EXPECT_LT((g - *next++).norm(), 1e-12) << name;
  });
}

TEST_F(TrainingLayers, TokensAndPositionsMayStartApart) {
  Embedding<double> layer(4, 6, width, EmbeddingStart::apart, random);
  const std::vector<int> tokens = {2, 2, 3};
  const std::vector<Index> one = {0, 3};
  const Matrix<double> y = layer.forward(tokens, one).matrix();
  EXPECT_EQ(y.row(0).head(3), y.row(1).head(3));
  EXPECT_NE(y.row(1).head(3), y.row(2).head(3));
  for (Index i = 0; i < 3; ++i) {
    const auto angle = static_cast<double>(i);
    EXPECT_DOUBLE_EQ(y(i, 3), std::sin(angle));
    EXPECT_DOUBLE_EQ(y(i, 4), std::cos(angle));
    EXPECT_DOUBLE_EQ(y(i, 5), std::sin(angle * std::pow(1e4, -2.0 / 3)));
  }
}

TEST_F(TrainingLayers, AModelRefusesASequenceLongerThanItsPositions) {
  Embedding<double> layer(4, 6, width, EmbeddingStart::small, random);
  const std::vector<int> tokens(7, 1);
  const std::vector<Index> one = {0, 7};
  EXPECT_THROW(layer.forward(tokens, one), std::invalid_argument);
}

}  // namespace
