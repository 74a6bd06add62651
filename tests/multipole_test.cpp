#include <nearfar/multipole.hpp>
#include <nearfar/softmax.hpp>

#include "support/compare.hpp"
#include "support/sample.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <string>

namespace nearfar::test {
namespace {

const Heads small{.query = 4, .key_value = 2, .dim = 5};

/// Every kind of pooling, with both kinds of queries where they exist: what a property must hold for.
std::vector<MultipoleOptions> every_kind(Index block, Index rank, bool causal_too = true) {
  std::vector<MultipoleOptions> all;
  for (const Pooling pooling : {Pooling::average, Pooling::grouped_convolution, Pooling::hierarchical_convolution}) {
    for (const bool mass_scaling : {true, false}) {
      MultipoleOptions options{.block = block, .rank = rank, .mass_scaling = mass_scaling, .pooling = pooling};
      options.levels = 8;
      all.push_back(options);
      options.pooled_queries = true;
      all.push_back(options);
      options.pooled_queries = false;
      options.causal = true;
      if (causal_too) all.push_back(options);
    }
  }
  return all;
}

std::string describe(const MultipoleOptions& options) {
  return "pooling " + std::to_string(static_cast<int>(options.pooling)) + (options.causal ? ", causal" : "") +
         (options.mass_scaling ? ", mass" : "") + (options.pooled_queries ? ", pooled queries" : "");
}

/// Attention whose learned parameters, if any, are random.
template <class T>
Multipole<T> make(const Heads& heads, const MultipoleOptions& options) {
  Multipole<T> attention(heads, options);
  Random random(99);
  attention.parameters().for_each(
      [&](const std::string&, Matrix<T>& matrix) { matrix = random.matrix<T>(matrix.rows(), matrix.cols(), 0.3); });
  return attention;
}

/// Averaging multipole attention by its definition, one query and one column at a time; and its log-sum-exps.
struct Naive {
  Heads heads;
  MultipoleOptions options;

  Matrix<double> out;
  Matrix<double> log_sum_exp;

  void attend(const Sample<double>& sample) {
    const Index n = sample.query.rows(), d = heads.dim, m = options.block, p = options.rank;
    const auto seen = [&](Index j) { return sample.key_mask.empty() || sample.key_mask[static_cast<std::size_t>(j)]; };
    Index levels = 0;
    while (m << (levels + 1) < n) ++levels;
    out = Matrix<double>::Zero(n, heads.query * d);
    log_sum_exp = Matrix<double>::Constant(heads.query, n, -std::numeric_limits<double>::infinity());
    for (Index h = 0; h < heads.query; ++h) {
      const auto query = sample.query.middleCols(h * d, d);
      const auto key = sample.key.middleCols(h / heads.group() * d, d);
      const auto value = sample.value.middleCols(h / heads.group() * d, d);
      for (Index i = 0; i < n; ++i) {
        std::vector<double> scores;
        std::vector<Eigen::RowVectorXd> values;
        const auto add = [&](const Eigen::RowVectorXd& q, const Eigen::RowVectorXd& k, const Eigen::RowVectorXd& v,
                             double mass) {
          scores.push_back(q.dot(k) / std::sqrt(static_cast<double>(d)) + std::log(mass));
          values.push_back(v);
        };
        for (Index j = 0; j < n; ++j) {
          if (std::abs(j / m - i / m) <= 1 && seen(j) && !(options.causal && j > i)) {
            add(query.row(i), key.row(j), value.row(j), 1);
          }
        }
        for (Index l = 1; l <= levels; ++l) {
          const Index width = m << (l - 1), share = width / p, g = i / width;
          Eigen::RowVectorXd q = query.row(i);
          if (options.pooled_queries) {
            q = mean(query, i / share * share, share, [&](Index j) {
                  return options.query_pooling == QueryPooling::all || seen(j);
                }).first;
          }
          for (Index c = 0; c * share < n; ++c) {
            const Index far = c / p;
            if (std::abs(far / 2 - g / 2) > 1 || std::abs(far - g) < 2 || (options.causal && far > g)) continue;
            const auto [k, mass] = mean(key, c * share, share, seen);
            if (mass > 0) add(q, k, mean(value, c * share, share, seen).first, options.mass_scaling ? mass : 1);
          }
        }
        if (scores.empty()) continue;
        const double largest = *std::max_element(scores.begin(), scores.end());
        double sum = 0;
        for (std::size_t c = 0; c < scores.size(); ++c) {
          sum += std::exp(scores[c] - largest);
          out.row(i).segment(h * d, d) += std::exp(scores[c] - largest) * values[c];
        }
        out.row(i).segment(h * d, d) /= sum;
        log_sum_exp(h, i) = largest + std::log(sum);
      }
    }
  }

  /// The mean of those of `count` rows that are seen, and how many they are.
  template <class Rows, class Seen>
  static std::pair<Eigen::RowVectorXd, double> mean(const Rows& rows, Index first, Index count, Seen&& seen) {
    Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(rows.cols());
    double number = 0;
    for (Index j = first; j < std::min(first + count, rows.rows()); ++j) {
      if (!seen(j)) continue;
      sum += rows.row(j);
      ++number;
    }
    return {number > 0 ? Eigen::RowVectorXd(sum / number) : sum, number};
  }
};

TEST(Multipole, FollowsTheDefinitionAtEveryLength) {
  std::vector<Index> lengths{0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 67, 101, 257};
  for (const auto& [block, rank] : std::vector<std::pair<Index, Index>>{{8, 2}, {3, 3}, {16, 4}, {1, 1}}) {
    for (MultipoleOptions options : every_kind(block, rank)) {
      if (options.pooling != Pooling::average) continue;
      for (const Index n : lengths) {
        for (const double hidden : {0.0, 0.4}) {
          auto sample = random_sample<double>(small, n, 1);
          if (hidden > 0) sample.key_mask = Random(2).mask(n, hidden);
          options.query_pooling = n % 2 == 0 ? QueryPooling::all : QueryPooling::unmasked;
          Naive naive{small, options, {}, {}};
          naive.attend(sample);
          poison_masked_keys(sample);
          const Multipole<double> attention(small, options);
          Matrix<double> out = naive.out * std::nan("");
          Multipole<double>::Saved saved;
          attention.forward(sample.inputs(), out, saved);
          EXPECT_TRUE(close(out, naive.out, 1e-12))
              << describe(options) << ", n " << n << ", block " << block << ", rank " << rank;
          EXPECT_TRUE(close(saved.log_sum_exp, naive.log_sum_exp, 1e-12)) << describe(options) << ", n " << n;
        }
      }
    }
  }
}

TEST(Multipole, FollowsTheDefinitionWhereABlockIsLargerThanATile) {
  const Heads heads{.query = 1, .key_value = 1, .dim = 3};
  const auto sample = random_sample<double>(heads, 2011, 1);
  for (const MultipoleOptions& options : every_kind(600, 3)) {
    if (options.pooling != Pooling::average || !options.mass_scaling) continue;
    Naive naive{heads, options, {}, {}};
    naive.attend(sample);
    EXPECT_TRUE(close(run_forward(Multipole<double>(heads, options), sample), naive.out, 1e-12)) << describe(options);
  }
}

TEST(Multipole, EqualsSoftmaxWhereABlockHoldsTheWholeSequence) {
  auto sample = random_sample<double>(small, 50, 3);
  sample.key_mask = Random(4).mask(50, 0.3);
  poison_masked_keys(sample);
  for (const MultipoleOptions& options : every_kind(64, 4)) {
    const Softmax<double> softmax(small, {.causal = options.causal});
    EXPECT_TRUE(close(run_forward(make<double>(small, options), sample), run_forward(softmax, sample), 1e-12))
        << describe(options);
  }
}

TEST(Multipole, EqualsSoftmaxWithOneLevelOfFullRank) {
  auto sample = random_sample<double>(small, 61, 3);
  sample.key_mask = Random(4).mask(61, 0.3);
  for (const bool causal : {false, true}) {
    const Softmax<double> softmax(small, {.causal = causal});
    const Multipole<double> attention(small, {.block = 16, .rank = 16, .causal = causal});
    EXPECT_TRUE(close(run_forward(attention, sample), run_forward(softmax, sample), 1e-12));
  }
}

// With one key for all tokens every weight is the same, and the masses make the means of groups into the mean of all.
TEST(Multipole, EqualsSoftmaxWhereAllKeysAreEqualThanksToTheMasses) {
  auto sample = random_sample<double>(small, 203, 5);
  sample.key.rowwise() = Eigen::RowVectorXd(sample.key.row(0));
  sample.key_mask = Random(6).mask(203, 0.3);
  for (const bool pooled_queries : {false, true}) {
    MultipoleOptions options{.block = 8, .rank = 2, .pooled_queries = pooled_queries};
    options.query_pooling = QueryPooling::all;
    sample.query.rowwise() = Eigen::RowVectorXd(sample.query.row(0));
    const auto exact = run_forward(Softmax<double>(small), sample);
    EXPECT_TRUE(close(run_forward(Multipole<double>(small, options), sample), exact, 1e-12));
    options.mass_scaling = false;
    EXPECT_FALSE(close(run_forward(Multipole<double>(small, options), sample), exact, 1e-3));
  }
}

TEST(Multipole, LearnedPoolingStartsAsTheAverage) {
  const auto sample = random_sample<double>(small, 128, 7);
  const auto average = run_forward(Multipole<double>(small, {.block = 8, .rank = 2}), sample);
  for (const Pooling pooling : {Pooling::grouped_convolution, Pooling::hierarchical_convolution}) {
    const Multipole<double> learned(small, {.block = 8, .rank = 2, .pooling = pooling, .levels = 3});
    EXPECT_TRUE(close(run_forward(learned, sample), average, 1e-12));
  }
}

TEST(Multipole, CausalRowsDoNotDependOnLaterTokensToTheBit) {
  const Index n = 120;
  for (MultipoleOptions options : every_kind(8, 2)) {
    if (!options.causal) continue;
    const auto attention = make<float>(small, options);
    const auto sample = random_sample<float>(small, n, 8);
    const auto before = run_forward(attention, sample);
    for (const Index changed : {1, 31, 64, 100, 119}) {
      auto other = sample;
      for (auto* matrix : {&other.query, &other.key, &other.value}) {
        matrix->bottomRows(n - changed) *= -3;
      }
      const auto after = run_forward(attention, other);
      EXPECT_TRUE(same_bits(after.topRows(changed), before.topRows(changed))) << describe(options);
      EXPECT_FALSE(same_bits(after, before));
    }
  }
}

TEST(Multipole, APackedBatchIsItsSequencesOneByOneToTheBit) {
  for (const MultipoleOptions& options : every_kind(4, 2)) {
    const auto attention = make<float>(small, options);
    std::vector<Sample<float>> parts;
    for (const Index n : {0, 37, 1, 0, 90, 8, 0}) {
      parts.push_back(random_sample<float>(small, n, 9 + static_cast<std::uint64_t>(n)));
      if (n == 90) parts.back().key_mask = Random(1).mask(n, 0.3);
    }
    const auto packed = run_forward(attention, pack<float>(parts));
    Index row = 0;
    for (const auto& part : parts) {
      const auto alone = run_forward(attention, part);
      EXPECT_TRUE(same_bits(packed.middleRows(row, alone.rows()), alone)) << describe(options);
      row += alone.rows();
    }
  }
}

TEST(Multipole, APaddedSequenceIsTheShortenedOne) {
  const Index n = 75;
  for (const MultipoleOptions& options : every_kind(4, 2)) {
    const auto attention = make<double>(small, options);
    auto padded = random_sample<double>(small, 200, 10);
    padded.key_mask.assign(200, 0);
    std::fill_n(padded.key_mask.begin(), n, std::uint8_t{1});
    poison_masked_keys(padded);
    const auto shortened = first_tokens(padded, n);
    EXPECT_TRUE(close(run_forward(attention, padded).topRows(n), run_forward(attention, shortened), 1e-12))
        << describe(options);
  }
}

TEST(Multipole, GroupedHeadsAreRepeatedOnes) {
  const auto sample = random_sample<double>(small, 75, 11);
  const Heads repeated{.query = small.query, .key_value = small.query, .dim = small.dim};
  for (const MultipoleOptions& options : every_kind(4, 2)) {
    EXPECT_TRUE(same_bits(run_forward(make<double>(small, options), sample),
                          run_forward(make<double>(repeated, options), repeat_key_heads(small, sample))));
  }
}

TEST(Multipole, DoesNotDependOnTheNumberOfThreads) {
  auto sample = random_sample<float>(small, 3000, 12);
  sample.key_mask = Random(13).mask(3000, 0.2);
  for (const MultipoleOptions& options : every_kind(16, 4)) {
    const auto attention = make<float>(small, options);
    const auto alone = run_forward(attention, sample, 1);
    for (const int threads : {2, 3, 8}) {
      EXPECT_TRUE(same_bits(run_forward(attention, sample, threads), alone)) << describe(options);
    }
  }
}

TEST(Multipole, RowsThatSeeNothingAreZero) {
  auto sample = random_sample<float>(small, 70, 14);
  sample.key_mask.assign(70, 0);
  poison_masked_keys(sample);
  for (const MultipoleOptions& options : every_kind(4, 2)) {
    Matrix<float> out = Matrix<float>::Constant(70, small.out_cols(), std::nanf(""));
    Multipole<float>::Saved saved;
    make<float>(small, options).forward(sample.inputs(), out, saved);
    EXPECT_TRUE((out.array() == 0).all()) << describe(options);
    EXPECT_TRUE((saved.log_sum_exp.array() == -std::numeric_limits<float>::infinity()).all());
  }
}

TEST(Multipole, StaysFiniteAtLargeLogits) {
  auto sample = random_sample<float>(small, 100, 15);
  sample.query *= 300;
  sample.key *= 300;
  for (const MultipoleOptions& options : every_kind(4, 2)) {
    EXPECT_TRUE(finite(run_forward(make<float>(small, options), sample))) << describe(options);
  }
}

TEST(Multipole, TakesViewsOfLargerMatrices) {
  const auto sample = random_sample<float>(small, 70, 16);
  Scattered<float> query(sample.query), key(sample.key), value(sample.value);
  for (const MultipoleOptions& options : every_kind(4, 2)) {
    const auto attention = make<float>(small, options);
    Scattered<float> out(Matrix<float>::Zero(70, small.out_cols()));
    attention.forward(Inputs<float>{query.view(), key.view(), value.view()}, out.view());
    EXPECT_TRUE(same_bits(out.view(), run_forward(attention, sample))) << describe(options);
    EXPECT_TRUE(out.is_intact());
  }
}

/// sum(grad_out * out) at parameters and inputs moved by `step` along `direction`.
double moved_loss(Multipole<double> attention, Sample<double> sample, const Matrix<double>& grad_out,
                  const Gradients<double, MultipoleParameters<double>>& direction, double step) {
  sample.query += step * direction.query;
  sample.key += step * direction.key;
  sample.value += step * direction.value;
  std::vector<const Matrix<double>*> along;
  auto parameters = direction.parameters;
  parameters.for_each([&](const std::string&, const Matrix<double>& matrix) { along.push_back(&matrix); });
  std::size_t next = 0;
  attention.parameters().for_each([&](const std::string&, Matrix<double>& matrix) { matrix += step * *along[next++]; });
  return run_forward(attention, sample).cwiseProduct(grad_out).sum();
}

TEST(Multipole, HasTheGradientsThatDifferencesShow) {
  const Heads heads{.query = 2, .key_value = 1, .dim = 3};
  // The longer ones are cut into several segments, whose gradients meet; a block of the last is larger than a tile.
  for (const auto& [n, block] : std::vector<std::pair<Index, Index>>{{53, 4}, {1900, 16}, {2011, 600}}) {
    for (const MultipoleOptions& options : every_kind(block, 2)) {
      if (n == 2011 && options.pooling != Pooling::average) continue;
      const auto attention = make<double>(heads, options);
      auto sample = random_sample<double>(heads, n, 20);
      sample.key_mask = Random(21).mask(n, 0.3);
      Random random(22);
      const auto grad_out = random.matrix<double>(n, heads.out_cols());
      auto gradients = run_backward(attention, sample, grad_out);
      ASSERT_TRUE(finite(gradients.query) && finite(gradients.key) && finite(gradients.value));

      auto direction = gradients;
      double expected = 0;
      const auto turn = [&](Matrix<double>& matrix) {
        const Matrix<double> gradient = matrix;
        matrix = random.matrix<double>(matrix.rows(), matrix.cols());
        expected += matrix.cwiseProduct(gradient).sum();
      };
      turn(direction.query);
      turn(direction.key);
      turn(direction.value);
      direction.parameters.for_each([&](const std::string&, Matrix<double>& matrix) { turn(matrix); });
      const double step = 1e-5;
      const double above = moved_loss(attention, sample, grad_out, direction, step);
      const double below = moved_loss(attention, sample, grad_out, direction, -step);
      EXPECT_NEAR((above - below) / (2 * step), expected, 1e-6 * std::max(1.0, std::abs(expected)))
          << describe(options) << ", n " << n;
    }
  }
}

TEST(Multipole, GradientsDoNotDependOnTheNumberOfThreads) {
  auto sample = random_sample<float>(small, 3000, 23);
  sample.key_mask = Random(24).mask(3000, 0.2);
  const auto grad_out = Random(25).matrix<float>(3000, small.out_cols());
  for (const MultipoleOptions& options : every_kind(16, 4)) {
    const auto attention = make<float>(small, options);
    auto alone = run_backward(attention, sample, grad_out, 1);
    for (const int threads : {2, 8}) {
      auto together = run_backward(attention, sample, grad_out, threads);
      EXPECT_TRUE(same_bits(together.query, alone.query)) << describe(options);
      EXPECT_TRUE(same_bits(together.key, alone.key)) << describe(options);
      EXPECT_TRUE(same_bits(together.value, alone.value)) << describe(options);
      for (std::size_t l = 0; l < alone.parameters.key.size(); ++l) {
        EXPECT_TRUE(same_bits(together.parameters.key[l].weight, alone.parameters.key[l].weight));
        EXPECT_TRUE(same_bits(together.parameters.value[l].bias, alone.parameters.value[l].bias));
      }
    }
  }
}

TEST(Multipole, GradientsOfAPackedBatchAreThoseOfItsSequencesAndParametersAddUp) {
  for (const MultipoleOptions& options : every_kind(4, 2)) {
    const auto attention = make<double>(small, options);
    std::vector<Sample<double>> parts;
    for (const Index n : {0, 37, 1, 90}) parts.push_back(random_sample<double>(small, n, 26));
    const auto grad_out = Random(27).matrix<double>(128, small.out_cols());
    auto packed = run_backward(attention, pack<double>(parts), grad_out);
    auto added = packed.parameters;
    Index row = 0;
    for (const auto& part : parts) {
      const Index n = part.query.rows();
      auto alone = run_backward(attention, part, Matrix<double>(grad_out.middleRows(row, n)));
      EXPECT_TRUE(same_bits(packed.query.middleRows(row, n), alone.query)) << describe(options);
      EXPECT_TRUE(same_bits(packed.key.middleRows(row, n), alone.key)) << describe(options);
      EXPECT_TRUE(same_bits(packed.value.middleRows(row, n), alone.value)) << describe(options);
      for (std::size_t l = 0; l < added.key.size(); ++l) {
        added.key[l].weight -= alone.parameters.key[l].weight;
        added.value[l].bias -= alone.parameters.value[l].bias;
      }
      row += n;
    }
    for (std::size_t l = 0; l < added.key.size(); ++l) {
      EXPECT_LT(added.key[l].weight.cwiseAbs().maxCoeff(), 1e-12);
      EXPECT_LT(added.value[l].bias.cwiseAbs().maxCoeff(), 1e-12);
    }
  }
}

TEST(Multipole, RowsThatSeeNothingHaveZeroGradients) {
  auto sample = random_sample<float>(small, 70, 28);
  sample.key_mask.assign(70, 0);
  poison_masked_keys(sample);
  const auto grad_out = Random(29).matrix<float>(70, small.out_cols());
  for (const MultipoleOptions& options : every_kind(4, 2)) {
    auto gradients = run_backward(make<float>(small, options), sample, grad_out);
    for (const auto* gradient : {&gradients.query, &gradients.key, &gradients.value}) {
      EXPECT_TRUE((gradient->array() == 0).all()) << describe(options);
    }
    gradients.parameters.for_each(
        [](const std::string&, const Matrix<float>& matrix) { EXPECT_TRUE((matrix.array() == 0).all()); });
  }
}

template <class Action>
std::string error_of(Action&& action) {
  try {
    action();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST(Multipole, RefusesBadOptionsInOneSentence) {
  const auto error = [](const MultipoleOptions& options, const Heads& heads = small) {
    return error_of([&] { Multipole<float>(heads, options); });
  };
  EXPECT_EQ(error({.block = 64, .rank = 3}), "nearfar::Multipole: rank must divide block, but 3 does not divide 64.");
  EXPECT_EQ(error({.block = 0}), "nearfar::Multipole: block must be at least 1, but is 0.");
  EXPECT_EQ(error({.block = std::numeric_limits<Index>::max(), .rank = 1}),
            "nearfar::Multipole: block must be at most 576460752303423487, but is 9223372036854775807.");
  EXPECT_EQ(error({.block = 4, .levels = 60}),
            "nearfar::Multipole: levels must leave block * 2^(levels + 1) at most 2305843009213693951, but block is 4 "
            "and levels is 60.");
  EXPECT_EQ(error({.rank = 0}), "nearfar::Multipole: rank must be at least 1, but is 0.");
  EXPECT_EQ(error({.levels = -1}), "nearfar::Multipole: levels must be 0 or more, but is -1.");
  EXPECT_EQ(error({.scale = 0.0}), "nearfar::Multipole: scale must be positive and finite, but is 0.");
  EXPECT_EQ(error({.causal = true, .pooled_queries = true}),
            "nearfar::Multipole: pooled_queries cannot be causal, because the mean of a sub-block's queries depends on "
            "later tokens, but causal and pooled_queries are both true.");
  EXPECT_EQ(error({}, {.query = 2, .key_value = 2, .dim = 4, .value_dim = 6}),
            "nearfar::Multipole: heads.value_dim must equal heads.dim, but they are 6 and 4.");
}

TEST(Multipole, TakesBlocksOfAnyLengthThatIsNotRefused) {
  const auto sample = random_sample<double>(small, 50, 18);
  for (const bool causal : {false, true}) {
    const Multipole<double> one_block(small, {.block = Index{1} << 58, .rank = 1, .causal = causal});
    EXPECT_TRUE(
        close(run_forward(one_block, sample), run_forward(Softmax<double>(small, {.causal = causal}), sample), 1e-12));
  }
}

TEST(Multipole, RefusesParametersThatWereResized) {
  const MultipoleOptions options{.block = 4, .rank = 2, .pooling = Pooling::grouped_convolution, .levels = 2};
  const auto sample = random_sample<float>(small, 10, 17);
  const auto error_after = [&](auto&& change) {
    Multipole<float> attention(small, options);
    change(attention.parameters());
    return error_of([&] { run_forward(attention, sample); });
  };
  const std::string rows = std::to_string(2 * small.dim);
  EXPECT_EQ(error_after([](auto& parameters) { parameters.value[1].weight.resize(1, 1); }),
            "nearfar::Multipole: conv_v_w_2 must be " + rows + " x 8, but is 1 x 1.");
  EXPECT_EQ(error_after([](auto& parameters) { parameters.key[0].bias.resize(0, 0); }),
            "nearfar::Multipole: conv_k_b_1 must be 1 x " + rows + ", but is 0 x 0.");
  EXPECT_EQ(error_after([](auto& parameters) { parameters.key.pop_back(); }),
            "nearfar::Multipole: conv_k must have 2 levels, but has 1.");
}

TEST(Multipole, RefusesGradientsOfOtherParameters) {
  const Multipole<float> attention(small,
                                   {.block = 4, .rank = 2, .pooling = Pooling::grouped_convolution, .levels = 2});
  const auto sample = random_sample<float>(small, 10, 17);
  Matrix<float> out(10, small.out_cols());
  Matrix<float> grad_query = sample.query, grad_key = sample.key, grad_value = sample.value;
  Multipole<float>::Saved saved;
  attention.forward(sample.inputs(), out, saved);
  MultipoleParameters<float> none;
  EXPECT_EQ(error_of([&] {
              attention.backward(sample.inputs(), out, saved, out, {grad_query, grad_key, grad_value}, none);
            }),
            "nearfar::Multipole: the gradient of conv_k must have 2 levels, but has 0.");
}

TEST(Multipole, RefusesMoreLevelsThanItHasParametersForBeforeItWrites) {
  const Multipole<float> attention(small,
                                   {.block = 4, .rank = 2, .pooling = Pooling::hierarchical_convolution, .levels = 2});
  const auto sample = random_sample<float>(small, 33, 17);
  Matrix<float> out = Matrix<float>::Constant(33, small.out_cols(), 7);
  EXPECT_EQ(
      error_of([&] { attention.forward(sample.inputs(), out); }),
      "nearfar::Multipole: a sequence of 33 tokens needs pooling parameters for 3 levels, but options.levels is 2.");
  EXPECT_TRUE((out.array() == 7).all());
  attention.forward(first_tokens(sample, 32).inputs(), Tokens<float>(out).middle_rows(0, 32));
}

}  // namespace
}  // namespace nearfar::test
