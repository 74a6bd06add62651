#include <nearfar/linear.hpp>
#include <nearfar/reference.hpp>

#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/sample.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

// What is Linear's own: sequences of many segments, shared out in both ways, weights and added results, streams,
// options.

namespace nearfar::test {
namespace {

static_assert(DifferentiableAttention<Linear<float>> && StreamingAttention<Linear<double>>);

constexpr Index several_segments = 2 * detail::Segments::length + 321;

struct Square {
  static constexpr std::string_view name = "square";
  double value(double x) const { return x * x; }
  double derivative(double x) const { return 2 * x; }
};

std::vector<LinearOptions> both_directions() {
  const std::vector<AnyFeatureMap> maps = {feature_map::Elu{}, feature_map::Sigmoid{}};
  return {{.feature_maps = maps}, {.feature_maps = maps, .causal = true}};
}

Matrix<double> naive(const Heads& heads, const LinearOptions& options, const Inputs<double>& inputs) {
  reference::LinearTerms<double> terms;
  for (const AnyFeatureMap& map : options.feature_maps) {
    terms.feature_maps.push_back([map](double x) {
      map.value(&x, 1, 1, 1, &x, 1);
      return x;
    });
  }
  terms.normalize_features = options.normalize_features;
  terms.row_sum = options.normalizer == Normalizer::row_sum;
  terms.eps = options.eps;
  terms.causal = options.causal;
  return reference::linear(heads, inputs, terms);
}

std::string error_of(const Heads& heads, const LinearOptions& options) {
  try {
    Linear<float> attention(heads, options);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(Linear, OfManySegmentsIsAsTheReference) {
  const Heads heads{.query = 2, .key_value = 1, .dim = 5, .value_dim = 3};
  for (const LinearOptions& options : both_directions()) {
    for (const Index n_k : {several_segments, several_segments + 700}) {
      auto sample = random_sample<double>(heads, several_segments, 1, n_k);
      sample.key_mask = Random(2).mask(n_k, 0.2);
      std::fill_n(sample.key_mask.begin(), 900, std::uint8_t{0});
      const auto expected = naive(heads, options, sample.inputs());
      for (const int threads : {1, 8}) {
        EXPECT_TRUE(close(run_forward(Linear<double>(heads, options), sample, threads), expected, 1e-12))
            << "causal " << options.causal << ", n_k " << n_k << ", threads " << threads;
      }
    }
  }
}

// One head goes to several threads by its segments, many heads by themselves: both must give the same bits.
TEST(Linear, HasTheSameBitsHoweverItIsSharedOut) {
  for (const Index shared : {1, 3}) {
    const Heads heads{.query = 2 * shared, .key_value = shared, .dim = 12, .value_dim = 20};
    for (const LinearOptions& options : both_directions()) {
      const Linear<float> attention(heads, options);
      auto sample = random_sample<float>(heads, several_segments, 3);
      sample.key_mask = Random(4).mask(several_segments, 0.1);
      const Matrix<float> grad_out = Random(5).matrix<float>(several_segments, heads.out_cols());
      const auto expected = run_backward(attention, sample, grad_out, 1);
      for (const int threads : {2, 3, 8}) {
        SCOPED_TRACE(threads);
        const auto actual = run_backward(attention, sample, grad_out, threads);
        EXPECT_TRUE(same_bits(actual.out, expected.out));
        EXPECT_TRUE(same_bits(actual.query, expected.query));
        EXPECT_TRUE(same_bits(actual.key, expected.key));
        EXPECT_TRUE(same_bits(actual.value, expected.value));
      }
    }
  }
}

// In the gradient of sum(out * grad_out), that of one token by differences, across the borders of segments.
TEST(Linear, HasTheGradientOfForwardOverManySegments) {
  const Heads heads{.query = 2, .key_value = 1, .dim = 4, .value_dim = 3};
  for (const LinearOptions& options : both_directions()) {
    const Linear<double> attention(heads, options);
    auto sample = random_sample<double>(heads, several_segments, 6);
    const Matrix<double> grad_out = Random(7).matrix<double>(several_segments, heads.out_cols());
    const auto gradients = run_backward(attention, sample, grad_out, 2);
    const auto expect = [&](const char* name, Matrix<double>& matrix, const Matrix<double>& gradient) {
      const Matrix<double> at = matrix;
      for (const Index row : {Index{70}, detail::Segments::length - 1, detail::Segments::length + 1}) {
        Matrix<double> direction = Matrix<double>::Zero(at.rows(), at.cols());
        direction.row(row) = Random(static_cast<std::uint64_t>(row)).matrix<double>(1, at.cols());
        const auto loss = [&](double step) {
          matrix = at + step * direction;
          return run_forward(attention, sample, 2).cwiseProduct(grad_out).sum();
        };
        const double expected = (loss(1e-3) - loss(-1e-3)) / 2e-3;
        matrix = at;
        EXPECT_NEAR(gradient.cwiseProduct(direction).sum(), expected,
                    1e-5 * gradient.row(row).norm() * direction.norm())
            << name << " " << row << ", causal " << options.causal;
      }
    };
    expect("query", sample.query, gradients.query);
    expect("key", sample.key, gradients.key);
    expect("value", sample.value, gradients.value);
  }
}

TEST(Linear, OfSeveralMapsIsTheSumOverThem) {
  const Heads heads{.query = 4, .key_value = 2, .dim = 6};
  const auto sample = random_sample<double>(heads, 90, 8);
  LinearOptions options{.feature_maps = {feature_map::Elu{}, feature_map::Tanh{}, feature_map::Softplus{}}};
  const Matrix<double> together = run_forward(Linear<double>(heads, options), sample);
  Matrix<double> sum = 0 * together;
  for (const AnyFeatureMap& map : std::vector(options.feature_maps)) {
    options.feature_maps = {map};
    sum += run_forward(Linear<double>(heads, options), sample);
  }
  EXPECT_TRUE(close(together, sum, 1e-14));
}

TEST(Linear, WeighsEachMapHeadAndFeatureAndAddsToOut) {
  const Heads heads{.query = 4, .key_value = 2, .dim = 6, .value_dim = 5};
  for (LinearOptions options : both_directions()) {
    const Linear<double> attention(heads, options);
    const auto sample = random_sample<double>(heads, 150, 9);
    const auto inputs = sample.inputs();
    const Matrix<double> weights = Random(10).matrix<double>(2 * 4, 5);
    const Matrix<double> before = Random(11).matrix<double>(150, heads.out_cols());
    Matrix<double> out = before;
    Context context(2);
    {
      detail::Work work(context);
      detail::kernel_sum<double>(heads, attention.options())
          .forward({.inputs = inputs, .out = out, .weights = weights, .add = true}, work);
    }
    Matrix<double> expected = before;
    for (Index r = 0; r < 2; ++r) {
      options.feature_maps = {attention.options().feature_maps[static_cast<std::size_t>(r)]};
      const Matrix<double> of_map = run_forward(Linear<double>(heads, options), sample);
      for (Index h = 0; h < 4; ++h) {
        for (Index c = 0; c < 5; ++c) expected.col(h * 5 + c) += weights(r * 4 + h, c) * of_map.col(h * 5 + c);
      }
    }
    EXPECT_TRUE(close(out, expected, 1e-13)) << "causal " << options.causal;
  }
}

TEST(Linear, TakesAMapThatTheUserWrote) {
  const Heads heads{.query = 2, .key_value = 2, .dim = 7};
  const LinearOptions options{.feature_maps = {Square{}}, .causal = true};
  const auto sample = random_sample<double>(heads, 100, 12);
  EXPECT_TRUE(
      close(run_forward(Linear<double>(heads, options), sample), naive(heads, options, sample.inputs()), 1e-12));
}

TEST(Linear, WithoutEpsGivesZeroRowsWhereNoKeyIsSeen) {
  const Heads heads{.query = 1, .key_value = 1, .dim = 3};
  auto sample = random_sample<float>(heads, 5, 13);
  sample.query(0, 0) = std::numeric_limits<float>::infinity();
  sample.key_mask = {0, 0, 1, 1, 1};
  poison_masked_keys(sample);
  const auto out = run_forward(Linear<float>(heads, {.causal = true, .eps = 0}), sample);
  EXPECT_TRUE(out.topRows(2).isZero(0));
  EXPECT_TRUE(rows_close(out.row(2), sample.value.row(2), 1e-6));
  EXPECT_TRUE(finite(out));
}

TEST(Linear, WithFeaturesThatSumToZeroStaysFinite) {
  const Heads heads{.query = 1, .key_value = 1, .dim = 4};
  auto sample = random_sample<double>(heads, 6, 14);
  sample.key.row(2).setConstant(-1);
  sample.query.row(4).setConstant(-1);
  const Linear<double> attention(heads, {.feature_maps = {feature_map::Relu{}}, .normalize_features = true});
  const auto result = run_backward(attention, sample, Matrix<double>(Matrix<double>::Ones(6, 4)));
  EXPECT_TRUE(finite(result.out));
  EXPECT_TRUE(result.out.row(4).isZero(0));
  EXPECT_TRUE(finite(result.query) && finite(result.key) && finite(result.value));
}

TEST(Linear, StreamOfPiecesAcrossSegmentsIsAsForward) {
  const Heads heads{.query = 2, .key_value = 1, .dim = 5};
  const Linear<double> attention(heads, {.causal = true});
  const auto sample = random_sample<double>(heads, several_segments, 15);
  const auto expected = run_forward(attention, sample);
  Matrix<double> out(several_segments, heads.out_cols());
  auto state = attention.start();
  Index first = 0;
  for (const Index count : {Index{1}, Index{1000}, detail::Segments::length + 100, Index{0}, Index{1}}) {
    attention.extend(state,
                     {sample.query.middleRows(first, count), sample.key.middleRows(first, count),
                      sample.value.middleRows(first, count)},
                     out.middleRows(first, count));
    first += count;
  }
  EXPECT_TRUE(close(out.topRows(first), expected.topRows(first), 1e-12));
}

TEST(Linear, RefusesBadOptionsAndStreamsInPlainSentences) {
  const Heads heads{.query = 2, .key_value = 2, .dim = 4};
  EXPECT_EQ(error_of(heads, {.feature_maps = {}}),
            "nearfar::Linear: feature_maps must hold at least one map, but holds 0.");
  EXPECT_EQ(error_of(heads, {.eps = -1}), "nearfar::Linear: eps must be finite and 0 or more, but is -1.");
  EXPECT_EQ(error_of({.query = 3, .key_value = 2, .dim = 4}, {}),
            "nearfar::Linear: heads.key_value must divide heads.query, but 2 does not divide 3.");
  const auto start_error = [&](const LinearOptions& options) -> std::string {
    try {
      Linear<float>(heads, options).start();
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(start_error({}), "nearfar::Linear: a stream needs causal attention, but causal is false.");
  EXPECT_EQ(start_error({.causal = true, .normalizer = Normalizer::sqrt_length}),
            "nearfar::Linear: a stream needs normalizer row_sum, but normalizer is sqrt_length.");
}

TEST(Linear, RefusesASavedOrAStateOfAnotherCall) {
  const Heads heads{.query = 2, .key_value = 2, .dim = 4};
  const Linear<float> attention(heads, {.causal = true});
  const auto sample = random_sample<float>(heads, 3, 16);
  Matrix<float> out(3, 8), query(3, 8), key(3, 8), value(3, 8);
  NoParameters none;
  EXPECT_THROW(attention.backward(sample.inputs(), out, {}, out, {query, key, value}, none), std::invalid_argument);
  Linear<float>::State state;
  EXPECT_THROW(attention.extend(state, sample.inputs(), out), std::invalid_argument);
}

}  // namespace
}  // namespace nearfar::test
