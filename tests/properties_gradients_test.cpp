#include "subjects/properties.hpp"

// The backward pass of every mechanism against differences of its own forward pass, and on the forward pass's borders.

namespace nearfar::test {
namespace {

class Gradient : public Property {
 protected:
  void SetUp() override {
    if (!make<double>()->can_be_trained()) GTEST_SKIP() << "no backward pass";
  }

  static Matrix<double> random_grad_out(const Sample<double>& sample, const Heads& heads = grouped_heads()) {
    return Random(1).matrix<double>(sample.query.rows(), heads.out_cols());
  }

  /// The derivative of sum(out * grad_out) along a direction of `matrix`, one of the inputs of `sample` or parameters
  /// of `subject`, by central differences of two widths, extrapolated.
  static double derivative(const Subject<double>& subject, const Sample<double>& sample, const Matrix<double>& grad_out,
                           Matrix<double>& matrix, const Matrix<double>& direction) {
    const Matrix<double> at = matrix;
    const auto difference = [&](double step) {
      matrix = at + step * direction;
      const double above = run_forward(subject, sample).cwiseProduct(grad_out).sum();
      matrix = at - step * direction;
      const double below = run_forward(subject, sample).cwiseProduct(grad_out).sum();
      matrix = at;
      return (above - below) / (2 * step);
    };
    return (4 * difference(5e-5) - difference(1e-4)) / 3;
  }

  /// Holds every gradient to differences along random directions, at queries and keys that stay clear of 0, where some
  /// feature maps have a kink.
  static void expect_differences(Sample<double> sample, const Heads& heads = grouped_heads(), int directions = 3,
                                 double allowed = 2e-7) {
    for (Matrix<double>* matrix : {&sample.query, &sample.key}) {
      *matrix += matrix->unaryExpr([](double x) { return x < 0 ? -0.02 : 0.02; });
    }
    const auto subject = make<double>(heads);
    const Matrix<double> grad_out = random_grad_out(sample, heads);
    const auto gradients = train(*subject, sample, grad_out);
    EXPECT_TRUE(close(gradients.at("out"), run_forward(*subject, sample), 1e-13)) << "forward that saves";
    Random random(2);
    const auto expect = [&](const std::string& name, Matrix<double>& matrix) {
      const Matrix<double>& gradient = gradients.at(name);
      ASSERT_EQ(gradient.rows(), matrix.rows()) << name;
      ASSERT_EQ(gradient.cols(), matrix.cols()) << name;
      for (int repeat = 0; repeat < directions; ++repeat) {
        const Matrix<double> direction = random.matrix<double>(matrix.rows(), matrix.cols());
        const double expected = derivative(*subject, sample, grad_out, matrix, direction);
        const double actual = gradient.cwiseProduct(direction).sum();
        EXPECT_NEAR(actual, expected, allowed * std::max(1.0, gradient.norm() * direction.norm())) << name;
      }
    };
    expect("query", sample.query);
    expect("key", sample.key);
    expect("value", sample.value);
    subject->each_parameter([&](const std::string& name, Matrix<double>& matrix) { expect(name, matrix); });
  }

  static void expect_float_near_double(const Sample<double>& sample, const Heads& heads = grouped_heads()) {
    const Matrix<double> grad_out = random_grad_out(sample, heads);
    const auto expected = train(*make<double>(heads), sample, grad_out);
    const auto actual = train(*make<float>(heads), cast<float>(sample), Matrix<float>(grad_out.cast<float>()));
    const double tolerance = std::max(5e-5, 5 * Property::tolerance<float>());
    for (const auto& [name, matrix] : expected) EXPECT_TRUE(close(actual.at(name), matrix, tolerance)) << name;
  }
};

INSTANTIATE_TEST_SUITE_P(All, Gradient, ::testing::ValuesIn(subject_cases()), subject_name);

TEST_P(Gradient, IsThatOfForward) {
  for (const Index n : {1, 2, 5, 40, 131}) {
    SCOPED_TRACE(n);
    expect_differences(random_sample<double>(grouped_heads(), n, 3));
  }
}

TEST_P(Gradient, OfMaskedAndPackedSequencesIsThatOfForward) {
  expect_differences(masked_sample<double>(70, 4));
  std::vector<Sample<double>> sequences;
  for (const Index n : {0, 33, 1, 0, 18}) sequences.push_back(masked_sample<double>(n, 5 + sequences.size()));
  expect_differences(pack<double>(sequences));
}

TEST_P(Gradient, OfMoreOrFewerKeysThanQueriesIsThatOfForward) {
  if (!any_shape()) GTEST_SKIP() << "as many queries as keys";
  expect_differences(random_sample<double>(grouped_heads(), 20, 6, 50));
  expect_differences(random_sample<double>(grouped_heads(), 50, 7, 20));
  expect_differences(random_sample<double>(grouped_heads(), 0, 17, 9));
}

TEST_P(Gradient, InFloatIsNearThatInDouble) { expect_float_near_double(masked_sample<double>(131, 8)); }

TEST_P(Gradient, OfEveryWidthIsThatOfForward) {
  for (const Index dim : widths) {
    SCOPED_TRACE(dim);
    const Heads heads{.query = 2, .key_value = 1, .dim = dim};
    const auto sample = random_sample<double>(heads, 21, 16);
    // A feature left out shows in the first digits, and at some width Nystrom's differences have no more than five.
    expect_differences(sample, heads, 1, 2e-5);
    expect_float_near_double(sample, heads);
  }
}

TEST_P(Gradient, OfKeysThatAreNeverSeenIsZeroWhateverTheyHold) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    const auto clean = masked_sample<T>(80, 9);
    auto poisoned = clean;
    poison_masked_keys(poisoned);
    if (GetParam().masked_token_reads_itself) poisoned.value = clean.value;
    const Matrix<T> grad_out = Random(10).matrix<T>(80, grouped_heads().out_cols());
    const auto expected = train(*subject, clean, grad_out);
    const auto actual = train(*subject, poisoned, grad_out);
    for (const auto& [name, matrix] : expected) EXPECT_TRUE(same_bits(actual.at(name), matrix)) << name;
    for (Index j = 0; j < 80; ++j) {
      if (clean.key_mask[static_cast<std::size_t>(j)] != 0) continue;
      EXPECT_TRUE(actual.at("key").row(j).isZero(0)) << j;
      EXPECT_TRUE(GetParam().masked_token_reads_itself || actual.at("value").row(j).isZero(0)) << j;
    }
  });
}

TEST_P(Gradient, IsZeroWhereNoKeyIsSeen) {
  if (GetParam().masked_token_reads_itself) GTEST_SKIP() << "masked tokens read themselves";
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    auto sample = random_sample<T>(grouped_heads(), 40, 11);
    sample.key_mask.assign(40, 0);
    poison_masked_keys(sample);
    const Matrix<T> grad_out = Random(12).matrix<T>(40, grouped_heads().out_cols());
    for (const auto& [name, matrix] : train(*subject, sample, grad_out)) {
      EXPECT_TRUE(matrix.isZero(0)) << name;
    }
  });
}

TEST_P(Gradient, StaysFiniteAtLargeScores) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    auto sample = masked_sample<T>(70, 13);
    sample.query *= T(400);
    sample.key *= T(400);
    const Matrix<T> grad_out = Random(14).matrix<T>(70, grouped_heads().out_cols());
    for (const auto& [name, matrix] : train(*subject, sample, grad_out)) EXPECT_TRUE(finite(matrix)) << name;
  });
}

TEST_P(Gradient, OfNoTokensIsEmpty) {
  const auto subject = make<double>();
  const auto sample = random_sample<double>(grouped_heads(), 0, 15);
  const auto gradients = train(*subject, sample, Matrix<double>(0, grouped_heads().out_cols()));
  EXPECT_EQ(gradients.at("query").rows(), 0);
  subject->each_parameter_gradient(
      [](const std::string& name, Matrix<double>& matrix) { EXPECT_TRUE(matrix.isZero(0)) << name; });
}

}  // namespace
}  // namespace nearfar::test
