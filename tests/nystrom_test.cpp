#include <nearfar/nystrom.hpp>
#include <nearfar/softmax.hpp>

#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/sample.hpp"

#include <gtest/gtest.h>

#include <Eigen/QR>

#include <array>
#include <string>

namespace nearfar::test {
namespace {

using Dense = Eigen::MatrixXd;

Dense softmax_rows(const Dense& scores) {
  Dense result = scores;
  for (Index i = 0; i < scores.rows(); ++i) {
    result.row(i) = (scores.row(i).array() - scores.row(i).maxCoeff()).exp();
    result.row(i) /= result.row(i).sum();
  }
  return result;
}

Dense pseudo_inverse(const Dense& matrix) { return matrix.completeOrthogonalDecomposition().pseudoInverse(); }

/// The equation as it stands, for one sequence.
Matrix<double> plain_nystrom(const Heads& heads, Index landmarks, const Sample<double>& sample) {
  const Index n = sample.query.rows(), dim = heads.dim, value_dim = heads.value_width();
  const auto seen = [&](Index i) {
    return sample.key_mask.empty() || sample.key_mask[static_cast<std::size_t>(i)] != 0;
  };
  Matrix<double> out = Matrix<double>::Zero(n, heads.out_cols());
  for (Index h = 0; h < heads.query; ++h) {
    const Dense q = sample.query.middleCols(h * dim, dim);
    const Dense k = sample.key.middleCols(h / heads.group() * dim, dim);
    const Dense v = sample.value.middleCols(h / heads.group() * value_dim, value_dim);
    std::vector<Index> tokens;
    for (Index i = 0; i < n; ++i) {
      if (seen(i)) tokens.push_back(i);
    }
    Dense query_means(0, dim), key_means(0, dim);
    for (Index t = 0; t < landmarks; ++t) {
      Eigen::RowVectorXd query_sum = Eigen::RowVectorXd::Zero(dim), key_sum = Eigen::RowVectorXd::Zero(dim);
      double count = 0;
      for (Index i = t * n / landmarks; i < (t + 1) * n / landmarks; ++i) {
        if (!seen(i)) continue;
        query_sum += q.row(i);
        key_sum += k.row(i);
        ++count;
      }
      if (count == 0) continue;
      query_means.conservativeResize(query_means.rows() + 1, dim);
      key_means.conservativeResize(key_means.rows() + 1, dim);
      query_means.bottomRows(1) = query_sum / count;
      key_means.bottomRows(1) = key_sum / count;
    }
    if (tokens.empty()) continue;
    const double scale = 1 / std::sqrt(static_cast<double>(dim));
    const Dense first = softmax_rows(scale * q * key_means.transpose());
    const Dense kernel = softmax_rows(scale * query_means * key_means.transpose());
    const Dense last = softmax_rows(scale * query_means * k(tokens, Eigen::seqN(0, k.cols())).transpose());
    out.middleCols(h * value_dim, value_dim) =
        first * pseudo_inverse(kernel) * last * v(tokens, Eigen::seqN(0, v.cols()));
  }
  return out;
}

Nystrom<double> nystrom(const Heads& heads, Index landmarks) {
  return Nystrom<double>(heads, {.landmarks = landmarks});
}

TEST(Nystrom, FollowsItsEquation) {
  Random random(1);
  for (const Index n : {1, 2, 7, 31, 64, 100}) {
    for (const Index landmarks : {1, 2, 5, 8}) {
      const Heads heads{4, 2, 5, 7};
      auto sample = random_sample<double>(heads, n, static_cast<std::uint64_t>(n));
      EXPECT_TRUE(close(run_forward(nystrom(heads, landmarks), sample), plain_nystrom(heads, landmarks, sample), 1e-9))
          << n << " tokens, " << landmarks << " landmarks";
      sample.key_mask = random.mask(n, 0.5);
      sample.key_mask[static_cast<std::size_t>(random.integer(0, n - 1))] = 1;
      EXPECT_TRUE(close(run_forward(nystrom(heads, landmarks), sample), plain_nystrom(heads, landmarks, sample), 1e-9))
          << n << " tokens, " << landmarks << " landmarks, masked";
    }
  }
}

TEST(Nystrom, IsTheSameForKeysThatComeInManyPieces) {
  const Heads heads{2, 1, 4};
  auto sample = random_sample<double>(heads, 5000, 3);
  EXPECT_TRUE(close(run_forward(nystrom(heads, 4), sample), plain_nystrom(heads, 4, sample), 1e-8));
  // One of the pieces has no key that may be seen.
  sample.key_mask.assign(5000, 1);
  std::fill(sample.key_mask.begin() + 2000, sample.key_mask.begin() + 4200, std::uint8_t{0});
  EXPECT_TRUE(close(run_forward(nystrom(heads, 4), sample), plain_nystrom(heads, 4, sample), 1e-8));
}

TEST(Nystrom, WithALandmarkForEveryTokenIsSoftmax) {
  const Heads heads{2, 1, 6};
  auto sample = random_sample<double>(heads, 12, 4);
  for (const Index landmarks : {12, 13, 100}) {
    EXPECT_TRUE(
        close(run_forward(nystrom(heads, landmarks), sample), run_forward(Softmax<double>(heads), sample), 1e-9));
  }
  // Rounding in float counts against the kernel there is, not against the largest there might be.
  const auto in_float = cast<float>(sample);
  Nystrom<float>::Saved saved;
  Matrix<float> out(12, heads.out_cols());
  Nystrom<float>(heads, {.landmarks = 10000000}).forward(in_float.inputs(), out, saved);
  EXPECT_TRUE(close(out, run_forward(Softmax<float>(heads), in_float), 1e-4));
  EXPECT_EQ(saved.inverse.cols(), heads.query * 12);

  sample.key_mask = {1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1};
  EXPECT_TRUE(close(run_forward(nystrom(heads, 12), sample), run_forward(Softmax<double>(heads), sample), 1e-9));
}

TEST(Nystrom, OfEqualTokensIsTheMeanOfTheirValues) {
  // All landmarks are the same, so that the kernel has rank one.
  const Heads heads{1, 1, 4};
  auto sample = random_sample<double>(heads, 40, 5);
  sample.query.rowwise() = sample.query.row(0).eval();
  sample.key.rowwise() = sample.key.row(0).eval();
  const Matrix<double> mean = sample.value.colwise().mean().replicate(40, 1);
  EXPECT_TRUE(close(run_forward(nystrom(heads, 7), sample), mean, 1e-13));
  EXPECT_TRUE(close(run_forward(Nystrom<float>(heads, {.landmarks = 7}), cast<float>(sample)), mean, 1e-6));
  // Such a kernel is its own inverse, and every step of the iteration leaves it as it is.
  EXPECT_TRUE(close(run_forward(Nystrom<double>(heads, {.landmarks = 7, .iterations = 6}), sample), mean, 1e-13));
}

TEST(Nystrom, CountsPivotsUpToTheToleranceAsZero) {
  const Heads heads{1, 1, 4};
  auto sample = random_sample<double>(heads, 40, 6);
  // Neighbours cancel: the landmark queries are small, the queries are not, and the kernel is almost of rank one.
  for (Index i = 0; i < 40; i += 2) sample.query.row(i + 1) = 1e-4 * sample.query.row(i + 1) - sample.query.row(i);
  const Matrix<double> mean = sample.value.colwise().mean().replicate(40, 1);
  EXPECT_TRUE(close(run_forward(Nystrom<double>(heads, {.landmarks = 4, .tolerance = 1e-2}), sample), mean, 1e-3));
  EXPECT_FALSE(close(run_forward(Nystrom<double>(heads, {.landmarks = 4, .tolerance = 0.0}), sample), mean, 1e-3));
}

TEST(Nystrom, IteratesTowardsTheInverse) {
  const Heads heads{4, 2, 5, 7};
  const auto sample = random_sample<double>(heads, 50, 30);
  const Matrix<double> exact = run_forward(nystrom(heads, 3), sample);
  const auto distance = [&](Index iterations) {
    const Nystrom<double> iterated(heads, {.landmarks = 3, .iterations = iterations});
    return (run_forward(iterated, sample) - exact).norm() / exact.norm();
  };
  // Of third order: each step leaves the cube of what the last one left, or close to it.
  EXPECT_GT(distance(1), 1e-2);
  EXPECT_LT(distance(6), distance(1));
  EXPECT_LT(distance(40), 1e-9);
}

TEST(Nystrom, AttendsEachSequenceOfABatchAlone) {
  const Heads heads{2, 1, 5, 3};
  std::vector<Sample<double>> sequences;
  for (const Index n : {3, 0, 17, 2100, 1, 0}) {
    sequences.push_back(random_sample<double>(heads, n, static_cast<std::uint64_t>(n + 1)));
  }
  sequences[2].key_mask = Random(7).mask(17, 0.3);
  const auto packed = pack<double>(sequences);
  const auto attention = nystrom(heads, 6);
  const Matrix<double> out = run_forward(attention, packed);
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    const Index first = packed.query_offsets[b];
    EXPECT_TRUE(close(out.middleRows(first, sequences[b].query.rows()), run_forward(attention, sequences[b]), 1e-10));
  }
}

TEST(Nystrom, NeverReadsMaskedKeys) {
  const Heads heads{2, 1, 5};
  auto sample = random_sample<float>(heads, 50, 8);
  sample.key_mask = Random(9).mask(50, 0.6);
  // The first segments have no token left.
  std::fill(sample.key_mask.begin(), sample.key_mask.begin() + 15, std::uint8_t{0});
  const Nystrom<float> attention(heads, {.landmarks = 8});
  const Matrix<float> out = run_forward(attention, sample);
  EXPECT_TRUE(finite(out));
  poison_masked_keys(sample);
  EXPECT_TRUE(same_bits(run_forward(attention, sample), out));
}

TEST(Nystrom, GivesZeroRowsWhereAllKeysAreMasked) {
  const Heads heads{2, 2, 3};
  auto sample = random_sample<double>(heads, 9, 10);
  sample.key_mask.assign(9, 0);
  poison_masked_keys(sample);
  const auto attention = nystrom(heads, 4);
  Matrix<double> out = Matrix<double>::Ones(9, 6);
  Nystrom<double>::Saved saved;
  attention.forward(sample.inputs(), out, saved);
  EXPECT_TRUE(out.isZero(0));
  EXPECT_TRUE((saved.log_sum_exp.array() == -std::numeric_limits<double>::infinity()).all());
}

TEST(Nystrom, SharesKeyHeadsAsIfTheyWereRepeated) {
  const Heads grouped{4, 2, 5}, repeated{4, 4, 5};
  const auto sample = random_sample<double>(grouped, 33, 11);
  EXPECT_TRUE(same_bits(run_forward(nystrom(grouped, 5), sample),
                        run_forward(nystrom(repeated, 5), repeat_key_heads(grouped, sample))));
}

TEST(Nystrom, DoesNotDependOnThreads) {
  const Heads heads{3, 1, 8};
  const auto sample = random_sample<float>(heads, 4500, 12);
  const Nystrom<float> attention(heads, {.landmarks = 16});
  const Matrix<float> out = run_forward(attention, sample, 1);
  for (const int threads : {2, 3, 8}) EXPECT_TRUE(same_bits(run_forward(attention, sample, threads), out));
}

TEST(Nystrom, TakesRowsThatLieApart) {
  const Heads heads{2, 1, 5};
  const auto sample = random_sample<float>(heads, 21, 13);
  Scattered query(sample.query), key(sample.key), value(sample.value), out(Matrix<float>(21, 10));
  const Nystrom<float> attention(heads, {.landmarks = 4});
  attention.forward({query.view(), key.view(), value.view()}, out.view());
  EXPECT_TRUE(same_bits(out.view(), run_forward(attention, sample)));
  EXPECT_TRUE(out.is_intact());
}

TEST(Nystrom, SavesTheSameOutThatItGives) {
  const Heads heads{2, 1, 5};
  const auto sample = random_sample<float>(heads, 30, 14);
  const Nystrom<float> attention(heads, {.landmarks = 4});
  Matrix<float> out(30, 10);
  Nystrom<float>::Saved saved;
  attention.forward(sample.inputs(), out, saved);
  EXPECT_TRUE(same_bits(out, run_forward(attention, sample)));
}

TEST(Nystrom, InFloatIsCloseToDouble) {
  const Heads heads{2, 2, 32};
  const auto sample = random_sample<float>(heads, 600, 15);
  const Nystrom<float> attention(heads, {.landmarks = 4});
  EXPECT_TRUE(close(run_forward(attention, sample), run_forward(nystrom(heads, 4), cast<double>(sample)), 1e-5));
}

/// The derivative of sum(out * grad_out) along a direction in queries, keys and values at once, by differences.
double derivative(const Nystrom<double>& attention, const Sample<double>& at, const Sample<double>& direction,
                  const Matrix<double>& grad_out) {
  const auto loss = [&](double step) {
    Sample<double> moved = at;
    moved.query += step * direction.query;
    moved.key += step * direction.key;
    moved.value += step * direction.value;
    return run_forward(attention, moved).cwiseProduct(grad_out).sum();
  };
  const auto difference = [&](double step) { return (loss(step) - loss(-step)) / (2 * step); };
  return (4 * difference(5e-5) - difference(1e-4)) / 3;
}

void expect_derivative(const Nystrom<double>& attention, const Sample<double>& at, const Sample<double>& direction) {
  const auto grad_out = Random(17).matrix<double>(at.query.rows(), attention.heads().out_cols());
  const auto gradients = run_backward(attention, at, grad_out);
  const double actual = gradients.query.cwiseProduct(direction.query).sum() +
                        gradients.key.cwiseProduct(direction.key).sum() +
                        gradients.value.cwiseProduct(direction.value).sum();
  const double expected = derivative(attention, at, direction, grad_out);
  EXPECT_NEAR(actual, expected, 1e-7 * std::max(1.0, std::abs(expected)));
}

TEST(Nystrom, HasTheGradientOfKeysThatComeInManyPieces) {
  const Heads heads{4, 2, 4};
  auto sample = random_sample<double>(heads, 4500, 18);
  sample.key_mask = Random(19).mask(4500, 0.2);
  std::fill(sample.key_mask.begin() + 2048, sample.key_mask.begin() + 4096, std::uint8_t{0});
  for (const std::uint64_t seed : {20U, 21U}) {
    expect_derivative(nystrom(heads, 3), sample, random_sample<double>(heads, 4500, seed));
  }
}

TEST(Nystrom, HasTheGradientAlongSequencesWhoseLandmarksStayEqual) {
  // Segments come in equal pairs and stay so: the kernel has half its size as rank, at every step.
  const Heads heads{2, 1, 6};
  const auto twins = [&](std::uint64_t seed) {
    auto sample = random_sample<double>(heads, 24, seed);
    for (const Index first : {0, 8, 16}) {
      sample.query.middleRows(first + 4, 4) = sample.query.middleRows(first, 4).eval();
      sample.key.middleRows(first + 4, 4) = sample.key.middleRows(first, 4).eval();
    }
    return sample;
  };
  for (const std::uint64_t seed : {23U, 24U, 25U}) expect_derivative(nystrom(heads, 6), twins(22), twins(seed));
}

TEST(Nystrom, HasItsGradientWherePivotsAreDropped) {
  const Heads heads{2, 1, 6};
  for (const double tolerance : {0.1, 0.3, 0.6}) {
    const Nystrom<double> dropping(heads, {.landmarks = 6, .tolerance = tolerance});
    const auto sample = random_sample<double>(heads, 24, 50);
    EXPECT_FALSE(close(run_forward(dropping, sample), run_forward(nystrom(heads, 6), sample), 1e-6)) << tolerance;
    for (const std::uint64_t seed : {51U, 52U}) {
      expect_derivative(dropping, sample, random_sample<double>(heads, 24, seed));
    }
  }
}

TEST(Nystrom, HasTheGradientOfItsIterations) {
  const Heads heads{2, 1, 6};
  for (const Index iterations : {1, 2, 6}) {
    const Nystrom<double> iterated(heads, {.landmarks = 6, .iterations = iterations});
    for (const std::uint64_t seed : {31U, 32U}) {
      expect_derivative(iterated, random_sample<double>(heads, 24, seed), random_sample<double>(heads, 24, seed + 10));
    }
  }
}

TEST(Nystrom, HasGradientsThatDoNotDependOnThreads) {
  const Heads heads{2, 1, 8};
  const auto sample = random_sample<float>(heads, 4500, 26);
  const auto grad_out = Random(27).matrix<float>(4500, heads.out_cols());
  const Nystrom<float> attention(heads, {.landmarks = 16});
  const auto expected = run_backward(attention, sample, grad_out, 1);
  for (const int threads : {2, 8}) {
    const auto actual = run_backward(attention, sample, grad_out, threads);
    EXPECT_TRUE(same_bits(actual.query, expected.query));
    EXPECT_TRUE(same_bits(actual.key, expected.key));
    EXPECT_TRUE(same_bits(actual.value, expected.value));
  }
}

TEST(Nystrom, RefusesWhatAnotherForwardSaved) {
  const Heads heads{1, 1, 4};
  const auto sample = random_sample<float>(heads, 9, 28), other = random_sample<float>(heads, 5, 29);
  const Nystrom<float> attention(heads, {.landmarks = 8});
  Matrix<float> out(5, 4), grad(9, 4);
  Nystrom<float>::Saved saved;
  NoParameters none;
  attention.forward(other.inputs(), out, saved);
  EXPECT_THROW(attention.backward(sample.inputs(), sample.value, saved, sample.value, {grad, grad, grad}, none),
               std::invalid_argument);
}

std::string message(const Heads& heads, const NystromOptions& options) {
  try {
    Nystrom<float> attention(heads, options);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST(Nystrom, RefusesBadOptions) {
  const Heads heads{2, 1, 4};
  EXPECT_EQ(message(heads, {.landmarks = 0}), "nearfar::Nystrom: landmarks must be at least 1, but is 0.");
  EXPECT_EQ(message(heads, {.tolerance = 1.0}),
            "nearfar::Nystrom: tolerance must be 0 or more and less than 1, but is 1.");
  EXPECT_EQ(message(heads, {.iterations = 0}), "nearfar::Nystrom: iterations must be at least 1, but is 0.");
  EXPECT_EQ(message(heads, {.tolerance = 0.5, .iterations = 6}),
            "nearfar::Nystrom: either tolerance or iterations may be given, but both are: 0.5 and 6.");
  EXPECT_EQ(message(heads, {.scale = -1.0}), "nearfar::Nystrom: scale must be positive and finite, but is -1.");
}

TEST(Nystrom, RefusesQueriesThatAreNotTheKeysTokens) {
  const Heads heads{1, 1, 4};
  const auto sample = random_sample<float>(heads, 5, 16, 6);
  try {
    run_forward(Nystrom<float>(heads), sample);
    FAIL() << "no error";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "nearfar::Nystrom: query and key must have the same rows, but have 5 and 6.");
  }
}

}  // namespace
}  // namespace nearfar::test
