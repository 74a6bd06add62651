#include <nearfar/reference.hpp>

#include "support/golden.hpp"

// The naive reference against every golden case, in double: what the mechanisms are tested against is itself held to
// values that other programs made.

namespace nearfar::test {
namespace {

using Map = std::function<double(double)>;

double elu(double x) { return x > 0 ? x + 1 : std::exp(x); }

const std::map<std::string, Map>& feature_maps() {
  static const std::map<std::string, Map> maps = {
      {"elu", elu},
      {"elu_flip", [](double x) { return elu(-x); }},
      {"tanh", [](double x) { return std::tanh(x) + 1; }},
      {"relu", [](double x) { return std::max(x, 0.0); }},
      {"sigmoid", [](double x) { return 1 / (1 + std::exp(-x)); }},
      {"softplus", [](double x) { return std::log1p(std::exp(x)); }},
      {"identity", [](double x) { return x; }},
  };
  return maps;
}

reference::LinearTerms<double> linear_terms(GoldenCase& golden, bool causal) {
  reference::LinearTerms<double> terms;
  terms.feature_maps = golden.choices("feature_maps", golden.integer("num_feature_maps"), feature_maps());
  terms.row_sum = golden.choice<bool>("normalizer", {{"row_sum", true}, {"sqrt_length", false}});
  if (terms.row_sum) terms.eps = golden.number("eps");
  terms.normalize_features = golden.flag("normalize_features");
  terms.causal = causal;
  return terms;
}

using Problem = GoldenProblem<double>;

void expect_array(GoldenCase& golden, const std::string& name, const Matrix<double>& actual) {
  EXPECT_TRUE(
      close(actual, golden.array<double>(name, actual.rows(), actual.cols()), golden_tolerance<double>(golden).out))
      << name;
}

void softmax(GoldenCase& golden, const Problem& problem) {
  expect_array(golden, "out", reference::softmax(problem.heads, problem.sample.inputs(), problem.causal));
}

void banded(GoldenCase& golden, const Problem& problem) {
  const Window window{golden.integer("left"), golden.integer("right")};
  expect_array(golden, "out", reference::banded(problem.heads, problem.sample.inputs(), window, problem.causal));
}

void linear(GoldenCase& golden, const Problem& problem) {
  const reference::LinearTerms<double> terms = linear_terms(golden, problem.causal);
  for (std::size_t r = 0; r < terms.feature_maps.size(); ++r) {
    reference::LinearTerms<double> one = terms;
    one.feature_maps = {terms.feature_maps[r]};
    expect_array(golden, "out_" + std::to_string(r), reference::linear(problem.heads, problem.sample.inputs(), one));
  }
}

void fmm(GoldenCase& golden, const Problem& problem) {
  const bool sigmoid = golden.flag("sigmoid_gates");
  const auto weight = [&](const std::string& name) -> Matrix<double> {
    const auto stored = golden.array<double>(name, problem.heads.query, problem.heads.dim);
    return sigmoid ? Matrix<double>(stored.unaryExpr(feature_maps().at("sigmoid"))) : stored;
  };
  reference::FmmTerms<double> terms{.window = {golden.integer("left"), golden.integer("right")},
                                    .linear = linear_terms(golden, problem.causal),
                                    .near_weight = weight("w_near"),
                                    .far_weights = {}};
  for (std::size_t r = 0; r < terms.linear.feature_maps.size(); ++r) {
    terms.far_weights.push_back(weight("w_far_" + std::to_string(r)));
  }
  expect_array(golden, "out", reference::fmm(problem.heads, problem.sample.inputs(), terms));
}

void nystrom(GoldenCase& golden, const Problem& problem) {
  golden.number("kernel_condition");
  golden.require(!problem.causal, "nystrom cannot be causal.");
  expect_array(golden, "out", reference::nystrom(problem.heads, problem.sample.inputs(), golden.integer("landmarks")));
}

void additive(GoldenCase& golden, const Problem& problem) {
  const Index heads = problem.heads.query, width = problem.heads.query_cols();
  const reference::AdditiveTerms<double> terms{.w_q = golden.array<double>("w_q", heads, width),
                                               .b_q = golden.array<double>("b_q", 1, heads),
                                               .w_k = golden.array<double>("w_k", heads, width),
                                               .b_k = golden.array<double>("b_k", 1, heads),
                                               .w_t = golden.array<double>("w_t", width, width),
                                               .b_t = golden.array<double>("b_t", 1, width),
                                               .causal = problem.causal};
  expect_array(golden, "out", reference::additive(problem.heads, problem.sample.inputs(), terms));
}

void multipole(GoldenCase& golden, const Problem& problem) {
  reference::MultipoleTerms<double> terms{.block = golden.integer("block"), .rank = golden.integer("rank")};
  terms.causal = problem.causal;
  terms.mass_scaling = golden.flag("mass_scaling");
  terms.pooling = golden.choice<reference::Pooling>(
      "pooling", {{"average", reference::Pooling::average},
                  {"grouped_conv", reference::Pooling::grouped_convolution},
                  {"hierarchical_conv", reference::Pooling::hierarchical_convolution}});
  terms.pooled_queries = golden.flag("downsampled_queries");
  if (golden.has("query_pooling")) {
    terms.all_queries = golden.choice<bool>("query_pooling", {{"unmasked", false}, {"all", true}});
  }
  const Index levels = golden.integer("levels");
  EXPECT_EQ(reference::multipole_levels(problem.tokens, terms.block), levels);
  if (terms.pooling != reference::Pooling::average) {
    for (Index l = 1; l <= levels; ++l) {
      const bool of_tokens = l == 1 || terms.pooling == reference::Pooling::grouped_convolution;
      const Index window = of_tokens ? terms.block << (l - 1) : 2 * terms.rank;
      const Index channels = problem.heads.dim * terms.rank;
      const auto convolution = [&](const std::string& which) {
        const std::string level = "_" + std::to_string(l);
        return reference::Convolution<double>{golden.array<double>("conv_" + which + "_w" + level, channels, window),
                                              golden.array<double>("conv_" + which + "_b" + level, 1, channels)};
      };
      terms.key_convolutions.push_back(convolution("k"));
      terms.value_convolutions.push_back(convolution("v"));
    }
  }
  expect_array(golden, "out", reference::multipole(problem.heads, problem.sample.inputs(), terms));
}

class Reference : public ::testing::TestWithParam<std::filesystem::path> {};

TEST_P(Reference, HoldsGoldenCase) {
  const std::map<std::string, void (*)(GoldenCase&, const Problem&)> mechanisms = {
      {"softmax", softmax}, {"banded", banded},     {"linear", linear},      {"fmm", fmm},
      {"nystrom", nystrom}, {"additive", additive}, {"multipole", multipole}};
  GoldenCase golden(GetParam());
  const auto mechanism = golden.choice("mechanism", mechanisms);
  mechanism(golden, Problem(golden));
  golden.ignore_gradients();
  golden.require_all_used();
}

INSTANTIATE_TEST_SUITE_P(Case, Reference, ::testing::ValuesIn(golden_files()),
                         [](const auto& file) { return golden_test_name(file.param); });

TEST(ReferenceCases, HoldsCases) { EXPECT_FALSE(golden_files().empty()) << "no case in " << golden_folder(); }

// What the golden cases have no example of: more keys than queries, values of another width, and packed batches.

TEST(ReferenceInputs, CausalQueriesAreAlignedWithTheEndOfTheKeys) {
  const Heads heads{2, 1, 3, 5};
  const auto whole = random_sample<double>(heads, 9, 1);
  auto last = whole;
  last.query = whole.query.bottomRows(4).eval();
  EXPECT_TRUE(close(reference::softmax(heads, last.inputs(), true),
                    reference::softmax(heads, whole.inputs(), true).bottomRows(4).eval(), 1e-14));
  EXPECT_TRUE(close(reference::banded(heads, last.inputs(), {2, 1}),
                    reference::banded(heads, whole.inputs(), {2, 1}).bottomRows(4).eval(), 1e-14));
  const reference::LinearTerms<double> terms{.feature_maps = {elu}, .causal = true};
  EXPECT_TRUE(close(reference::linear(heads, last.inputs(), terms),
                    reference::linear(heads, whole.inputs(), terms).bottomRows(4).eval(), 1e-14));
}

TEST(ReferenceInputs, PackedSequencesDoNotSeeEachOther) {
  const Heads heads{2, 1, 3};
  const std::vector<Sample<double>> sequences = {random_sample<double>(heads, 5, 1), random_sample<double>(heads, 0, 2),
                                                 random_sample<double>(heads, 3, 3)};
  const Matrix<double> out = reference::softmax(heads, pack<double>(sequences).inputs());
  EXPECT_TRUE(same_bits(out.topRows(5).eval(), reference::softmax(heads, sequences[0].inputs())));
  EXPECT_TRUE(same_bits(out.bottomRows(3).eval(), reference::softmax(heads, sequences[2].inputs())));
}

TEST(ReferenceInputs, MaskedKeysAreNeverReadAndRowsThatSeeNoneAreZero) {
  const Heads heads{1, 1, 3};
  auto sample = random_sample<double>(heads, 6, 1);
  sample.key_mask = {0, 0, 1, 1, 0, 1};
  const Matrix<double> clean = reference::softmax(heads, sample.inputs(), true);
  poison_masked_keys(sample);
  EXPECT_TRUE(same_bits(reference::softmax(heads, sample.inputs(), true), clean));
  EXPECT_TRUE(same_bits(clean.topRows(2).eval(), Matrix<double>::Zero(2, 3).eval()));
}

}  // namespace
}  // namespace nearfar::test
