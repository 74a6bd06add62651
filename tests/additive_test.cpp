#include <nearfar/additive.hpp>
#include <nearfar/reference.hpp>

#include "support/compare.hpp"
#include "support/sample.hpp"

#include <gtest/gtest.h>

#include <array>
#include <string>
#include <vector>

namespace nearfar::test {
namespace {

static_assert(DifferentiableAttention<Additive<float>>);
static_assert(StreamingAttention<Additive<double>>);

const Heads small{.query = 4, .key_value = 2, .dim = 5};

/// Heads below, at and above a block of heads; heads narrower and wider than a vector; shared and own key heads.
const std::vector<Heads> many_heads{{1, 1, 1}, {3, 3, 7}, {8, 8, 16}, {4, 1, 33}, {9, 3, 5}, {2, 2, 70}};

/// Every combination of the options.
std::vector<AdditiveOptions> every_option() {
  std::vector<AdditiveOptions> all;
  for (int bits = 0; bits < 32; ++bits) {
    all.push_back({.causal = (bits & 1) != 0,
                   .scale = (bits & 2) != 0 ? std::optional<double>(0.7) : std::nullopt,
                   .per_head_weights = (bits & 2) != 0,
                   .bias = (bits & 4) != 0,
                   .transform = (bits & 8) != 0,
                   .add_query = (bits & 16) != 0});
  }
  return all;
}

std::string describe(const AdditiveOptions& options) {
  return std::string(options.causal ? "causal" : "bidirectional") + (options.per_head_weights ? ", per head" : "") +
         (options.bias ? ", bias" : "") + (options.transform ? ", transform" : "") +
         (options.add_query ? ", query added" : "");
}

template <class T>
Additive<T> make(const Heads& heads, const AdditiveOptions& options, double size = 0.5) {
  Additive<T> attention(heads, options);
  Random random(99);
  attention.parameters().for_each(
      [&](const std::string&, Matrix<T>& matrix) { matrix = random.matrix<T>(matrix.rows(), matrix.cols(), size); });
  return attention;
}

template <class T>
Matrix<T> over_all_heads(const Heads& heads, const Matrix<T>& weights) {
  if (weights.cols() == heads.query_cols()) return weights;
  Matrix<T> result = Matrix<T>::Zero(heads.query, heads.query_cols());
  for (Index h = 0; h < heads.query; ++h) result.row(h).segment(h * heads.dim, heads.dim) = weights.row(h);
  return result;
}

/// The definition, with what the options leave out put in as zero or identity.
Matrix<double> naive(const Additive<double>& attention, const Inputs<double>& inputs) {
  const Heads heads = attention.heads();
  const AdditiveParameters<double>& own = attention.parameters();
  const Index width = heads.query_cols();
  const auto or_zero = [](const Matrix<double>& m, Index cols) {
    return m.size() > 0 ? m : Matrix<double>(Matrix<double>::Zero(1, cols));
  };
  const reference::AdditiveTerms<double> terms{
      .w_q = over_all_heads(heads, own.w_q),
      .b_q = or_zero(own.b_q, heads.query),
      .w_k = over_all_heads(heads, own.w_k),
      .b_k = or_zero(own.b_k, heads.query),
      .w_t = own.w_t.size() > 0 ? own.w_t : Matrix<double>(Matrix<double>::Identity(width, width)),
      .b_t = or_zero(own.b_t, width),
      .causal = attention.options().causal,
      .scale = attention.options().scale};
  const Matrix<double> out = reference::additive(heads, inputs, terms);
  return attention.options().add_query ? out : Matrix<double>(out - inputs.query.matrix());
}

TEST(Additive, FollowsTheDefinitionWithEveryOption) {
  for (const AdditiveOptions& options : every_option()) {
    const auto attention = make<double>(small, options);
    auto sample = random_sample<double>(small, 23, 1);
    sample.key_mask = Random(2).mask(23, 0.3);
    EXPECT_TRUE(close(run_forward(attention, sample), naive(attention, sample.inputs()), 1e-12)) << describe(options);
  }
}

TEST(Additive, FollowsTheDefinitionAtEveryLengthAndForAllHeads) {
  for (const bool causal : {false, true}) {
    for (const Heads& heads : many_heads) {
      const auto attention = make<double>(heads, {.causal = causal});
      for (const Index n : {0, 1, 2, 3, 4, 13, 127, 128, 129, 257}) {
        for (const double hidden : {0.0, 0.5}) {
          if (n > 100 && heads.query_cols() > 50) continue;
          auto sample = random_sample<double>(heads, n, 3);
          if (hidden > 0) sample.key_mask = Random(4).mask(n, hidden);
          EXPECT_TRUE(close(run_forward(attention, sample), naive(attention, sample.inputs()), 1e-12))
              << "n " << n << ", heads " << heads.query << ", dim " << heads.dim << (causal ? ", causal" : "");
        }
      }
    }
  }
}

TEST(Additive, StartsAsTheProductOfMeans) {
  const Heads heads{.query = 2, .key_value = 2, .dim = 3};
  const auto sample = random_sample<double>(heads, 11, 5);
  const Eigen::RowVectorXd key = sample.query.colwise().mean().cwiseProduct(sample.key.colwise().mean());
  const Matrix<double> expected = (sample.value.array().rowwise() * key.array()).matrix() + sample.query;
  EXPECT_TRUE(close(run_forward(Additive<double>(heads), sample), expected, 1e-12));
}

TEST(Additive, TakesOneViewAsQueryAndValue) {
  const Heads heads{.query = 4, .key_value = 4, .dim = 5};
  auto sample = random_sample<double>(heads, 31, 6);
  const auto attention = make<double>(heads, {});
  sample.value = sample.query;
  const Inputs<double> shared{sample.query, sample.key, sample.query};
  EXPECT_TRUE(same_bits(run_forward(attention, shared), run_forward(attention, sample)));
}

TEST(Additive, DoesNotSeeTheBiasesOfScores) {
  const auto sample = random_sample<double>(small, 40, 7);
  for (const bool causal : {false, true}) {
    auto attention = make<double>(small, {.causal = causal});
    const auto before = run_backward(attention, sample, sample.query);
    attention.parameters().b_q.setConstant(1e3);
    attention.parameters().b_k.setConstant(-7);
    const auto after = run_backward(attention, sample, sample.query);
    EXPECT_TRUE(same_bits(after.out, before.out));
    EXPECT_TRUE(same_bits(after.query, before.query));
    EXPECT_TRUE(after.parameters.b_q.isZero(0) && after.parameters.b_k.isZero(0));
  }
}

// The derivative along a random direction in all inputs and parameters at once, against a central difference.
TEST(Additive, GradientsAreThoseOfFiniteDifferences) {
  for (const AdditiveOptions& options : every_option()) {
    for (const Index n : {1, 6, 150}) {
      for (const double hidden : {0.0, 0.4}) {
        const auto attention = make<double>(small, options);
        auto sample = random_sample<double>(small, n, 8);
        if (hidden > 0) sample.key_mask = Random(9).mask(n, hidden);
        Random random(10);
        const Matrix<double> grad_out = random.matrix<double>(n, small.out_cols());
        auto gradients = run_backward(attention, sample, grad_out);

        const auto direction = random_sample<double>(small, n, 11);
        auto step = attention.parameters();
        step.for_each([&](const std::string&, Matrix<double>& m) { m = random.matrix<double>(m.rows(), m.cols()); });
        double expected = gradients.query.cwiseProduct(direction.query).sum() +
                          gradients.key.cwiseProduct(direction.key).sum() +
                          gradients.value.cwiseProduct(direction.value).sum();
        std::vector<Matrix<double>> steps;
        step.for_each([&](const std::string&, Matrix<double>& m) { steps.push_back(m); });
        std::size_t at = 0;
        gradients.parameters.for_each(
            [&](const std::string&, Matrix<double>& m) { expected += m.cwiseProduct(steps[at++]).sum(); });

        const auto loss = [&](double eps) {
          auto moved = attention;
          std::size_t i = 0;
          moved.parameters().for_each([&](const std::string&, Matrix<double>& m) { m += eps * steps[i++]; });
          auto inputs = sample;
          inputs.query += eps * direction.query;
          inputs.key += eps * direction.key;
          inputs.value += eps * direction.value;
          return run_forward(moved, inputs).cwiseProduct(grad_out).sum();
        };
        const double eps = 1e-4;
        const double slope = (8 * (loss(eps) - loss(-eps)) - (loss(2 * eps) - loss(-2 * eps))) / (12 * eps);
        EXPECT_NEAR(expected, slope, 1e-7 * std::max(1.0, gradients.out.norm() * grad_out.norm()))
            << describe(options) << ", n " << n << ", hidden " << hidden;
      }
    }
  }
}

TEST(Additive, AddsToTheGradientsOfParameters) {
  const auto sample = random_sample<double>(small, 20, 12);
  for (const bool causal : {false, true}) {
    const auto attention = make<double>(small, {.causal = causal});
    auto once = run_backward(attention, sample, sample.query);
    Additive<double>::Saved saved;
    Matrix<double> out = once.out, query = once.query, key = once.key, value = once.value;
    attention.forward(sample.inputs(), out, saved);
    auto twice = once.parameters;
    attention.backward(sample.inputs(), out, saved, sample.query, {query, key, value}, twice);
    EXPECT_TRUE(same_bits(query, once.query));
    std::vector<Matrix<double>> expected;
    once.parameters.for_each([&](const std::string&, Matrix<double>& m) { expected.push_back(2 * m); });
    std::size_t at = 0;
    twice.for_each(
        [&](const std::string& name, Matrix<double>& m) { EXPECT_TRUE(close(m, expected[at++], 1e-12)) << name; });
  }
}

TEST(Additive, StreamsTheRowsOfForward) {
  const Index n = 300;
  for (const AdditiveOptions& options : every_option()) {
    if (!options.causal) continue;
    const auto attention = make<double>(small, options);
    auto sample = random_sample<double>(small, n, 13);
    sample.key_mask = Random(14).mask(n, 0.3);
    sample.key_mask[0] = sample.key_mask[1] = 0;
    const auto expected = run_forward(attention, sample);
    for (const Index piece : {Index{1}, Index{7}, Index{130}, n}) {
      auto state = attention.start();
      Matrix<double> out = 0 * expected;
      for (Index first = 0; first < n; first += piece) {
        const Index count = std::min(piece, n - first);
        const Inputs<double> inputs{
            sample.query.middleRows(first, count), sample.key.middleRows(first, count),
            sample.value.middleRows(first, count),
            std::span(sample.key_mask).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count))};
        attention.extend(state, inputs, out.middleRows(first, count));
      }
      EXPECT_TRUE(close(out, expected, 1e-12)) << describe(options) << ", " << piece << " at a time";
    }
  }
}

TEST(Additive, KeepsMaskedTokensToTheirOwnRows) {
  const Index n = 140;
  for (const AdditiveOptions& options : every_option()) {
    const auto attention = make<double>(small, options);
    auto sample = random_sample<double>(small, n, 15);
    sample.key_mask = Random(16).mask(n, 0.3);
    Matrix<double> grad_out = Random(17).matrix<double>(n, small.out_cols());
    for (Index i = 0; i < n; ++i) grad_out.row(i) *= sample.key_mask[static_cast<std::size_t>(i)];
    auto expected = run_backward(attention, sample, grad_out);
    poison_masked_keys(sample);
    auto actual = run_backward(attention, sample, grad_out);
    for (Index i = 0; i < n; ++i) {
      if (sample.key_mask[static_cast<std::size_t>(i)] == 0) continue;
      EXPECT_TRUE(same_bits(actual.out.row(i), expected.out.row(i))) << describe(options) << ", row " << i;
    }
    EXPECT_TRUE(same_bits(actual.query, expected.query)) << describe(options);
    EXPECT_TRUE(same_bits(actual.key, expected.key)) << describe(options);
    EXPECT_TRUE(same_bits(actual.value, expected.value)) << describe(options);
    std::vector<Matrix<double>> parameters;
    expected.parameters.for_each([&](const std::string&, Matrix<double>& m) { parameters.push_back(m); });
    std::size_t at = 0;
    actual.parameters.for_each([&](const std::string& name, Matrix<double>& m) {
      EXPECT_TRUE(same_bits(m, parameters[at++])) << name << ", " << describe(options);
    });
  }
}

TEST(Additive, GivesBiasAndQueryWhereNoTokenIsSeen) {
  const Index n = 9;
  for (const bool causal : {false, true}) {
    const auto attention = make<float>(small, {.causal = causal});
    auto sample = random_sample<float>(small, n, 18);
    sample.key_mask.assign(static_cast<std::size_t>(n), 0);
    poison_masked_keys(sample);
    const Matrix<float> expected = sample.query.rowwise() + attention.parameters().b_t.row(0);
    const Matrix<float> grad_out = Matrix<float>::Ones(n, small.out_cols());
    EXPECT_TRUE(same_bits(run_forward(attention, sample), expected));
    sample.value.setOnes();
    const auto gradients = run_backward(attention, sample, grad_out);
    EXPECT_TRUE(same_bits(gradients.query, grad_out));
    EXPECT_TRUE(gradients.key.isZero(0) && gradients.value.isZero(0));
    EXPECT_TRUE(gradients.parameters.w_q.isZero(0) && gradients.parameters.w_k.isZero(0) &&
                gradients.parameters.w_t.isZero(0));
  }
}

TEST(Additive, StaysFiniteWithLargeLogits) {
  for (const bool causal : {false, true}) {
    const auto attention = make<float>(small, {.causal = causal, .transform = false}, 1e5);
    const auto sample = random_sample<float>(small, 200, 19);
    const auto gradients = run_backward(attention, sample, sample.query);
    EXPECT_TRUE(finite(gradients.out));
    EXPECT_TRUE(finite(gradients.query) && finite(gradients.key) && finite(gradients.value));
    EXPECT_TRUE(close(gradients.out,
                      naive(make<double>(small, attention.options(), 1e5), cast<double>(sample).inputs()), 2e-5));
  }
}

TEST(Additive, IsAsExactInFloatAsTheRoundingOfItsInputs) {
  const Heads heads{.query = 8, .key_value = 8, .dim = 16};
  for (const bool causal : {false, true}) {
    const auto sample = random_sample<float>(heads, 8192, 20);
    const auto in_float = run_forward(make<float>(heads, {.causal = causal, .transform = false}), sample);
    const auto in_double =
        run_forward(make<double>(heads, {.causal = causal, .transform = false}), cast<double>(sample));
    EXPECT_TRUE(rows_close(in_float, in_double, 2e-6));
  }
}

TEST(Additive, GivesTheSameBitsInAnyNumberOfThreads) {
  for (const AdditiveOptions& options : every_option()) {
    const auto attention = make<float>(small, options);
    const auto sample = random_sample<float>(small, 1500, 21);
    auto expected = run_backward(attention, sample, sample.query, 1);
    for (const int threads : {2, 3, 8}) {
      auto actual = run_backward(attention, sample, sample.query, threads);
      EXPECT_TRUE(same_bits(actual.out, expected.out)) << describe(options);
      EXPECT_TRUE(same_bits(actual.query, expected.query)) << describe(options);
      EXPECT_TRUE(same_bits(actual.key, expected.key)) << describe(options);
      EXPECT_TRUE(same_bits(actual.value, expected.value)) << describe(options);
      EXPECT_TRUE(same_bits(actual.parameters.w_q, expected.parameters.w_q)) << describe(options);
      EXPECT_TRUE(same_bits(actual.parameters.w_k, expected.parameters.w_k)) << describe(options);
      EXPECT_TRUE(same_bits(actual.parameters.w_t, expected.parameters.w_t)) << describe(options);
    }
  }
}

TEST(Additive, CausalRowsDoNotDependOnLaterTokensToTheBit) {
  const auto attention = make<float>(small, {.causal = true});
  auto sample = random_sample<float>(small, 300, 22);
  const auto before = run_forward(attention, sample);
  for (const Index kept : {1, 5, 127, 128, 129, 290}) {
    auto changed = sample;
    changed.query.bottomRows(300 - kept).setConstant(7);
    changed.key.bottomRows(300 - kept).setConstant(-3);
    EXPECT_TRUE(same_bits(run_forward(attention, changed).topRows(kept), before.topRows(kept))) << kept;
  }
}

TEST(Additive, PackedSequencesDoNotSeeEachOther) {
  for (const bool causal : {false, true}) {
    const auto attention = make<double>(small, {.causal = causal});
    std::vector<Sample<double>> sequences;
    for (const Index n : {5, 0, 300, 1}) {
      sequences.push_back(random_sample<double>(small, n, 23 + static_cast<std::uint64_t>(n)));
    }
    const auto packed = pack<double>(sequences);
    auto all = run_backward(attention, packed, packed.query);
    Matrix<double> w_k = 0 * all.parameters.w_k, w_t = 0 * all.parameters.w_t;
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      const Index first = packed.query_offsets[b], n = sequences[b].query.rows();
      const auto one = run_backward(attention, sequences[b], sequences[b].query);
      EXPECT_TRUE(same_bits(all.out.middleRows(first, n), one.out)) << b;
      EXPECT_TRUE(same_bits(all.query.middleRows(first, n), one.query)) << b;
      EXPECT_TRUE(same_bits(all.key.middleRows(first, n), one.key)) << b;
      EXPECT_TRUE(same_bits(all.value.middleRows(first, n), one.value)) << b;
      w_k += one.parameters.w_k;
      w_t += one.parameters.w_t;
    }
    EXPECT_TRUE(close(all.parameters.w_k, w_k, 1e-12));
    EXPECT_TRUE(close(all.parameters.w_t, w_t, 1e-12));
  }
}

TEST(Additive, ReadsAndWritesStridedUnalignedViews) {
  for (const bool causal : {false, true}) {
    const auto attention = make<float>(small, {.causal = causal});
    const auto sample = random_sample<float>(small, 45, 24);
    const auto expected = run_backward(attention, sample, sample.query);
    Scattered<float> query(sample.query), key(sample.key), value(sample.value), out(0 * expected.out);
    Scattered<float> grad_query(0 * sample.query), grad_key(0 * sample.key), grad_value(0 * sample.value);
    Additive<float>::Saved saved;
    auto grad_parameters = zeros_like(attention.parameters());
    const Inputs<float> inputs{query.view(), key.view(), value.view()};
    attention.forward(inputs, out.view(), saved);
    attention.backward(inputs, out.view(), saved, query.view(), {grad_query.view(), grad_key.view(), grad_value.view()},
                       grad_parameters);
    EXPECT_TRUE(same_bits(out.view(), expected.out));
    EXPECT_TRUE(same_bits(grad_query.view(), expected.query));
    EXPECT_TRUE(same_bits(grad_key.view(), expected.key));
    EXPECT_TRUE(same_bits(grad_value.view(), expected.value));
    EXPECT_TRUE(out.is_intact() && grad_query.is_intact() && grad_key.is_intact() && grad_value.is_intact());
  }
}

template <class Call>
std::string message_of(Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(Additive, SaysWhatIsWrong) {
  EXPECT_EQ(message_of([] { Additive<float>({.query = 2, .key_value = 2, .dim = 4, .value_dim = 3}); }),
            "nearfar::Additive: heads.value_dim must equal heads.dim, but they are 3 and 4.");
  EXPECT_EQ(message_of([] { Additive<float>(small).start(); }),
            "nearfar::Additive: a stream needs causal attention, but causal is false.");

  Additive<float> attention(small);
  const auto sample = random_sample<float>(small, 6, 25);
  EXPECT_EQ(message_of([&] { run_forward(attention, random_sample<float>(small, 6, 25, 7)); }),
            "nearfar::Additive: query and key must have the same rows, but have 6 and 7.");
  Additive<float>::Saved saved;
  Matrix<float> out(6, 20), query(6, 20), key(6, 10), value(6, 10), short_key(5, 10);
  auto gradients = attention.parameters();
  EXPECT_EQ(message_of([&] {
              attention.backward(sample.inputs(), out, saved, out, {query, short_key, value}, gradients);
            }),
            "nearfar::Additive: grad_key has 5 rows, but key has 6.");
  EXPECT_EQ(message_of([&] {
              attention.backward(sample.inputs(), out, saved, out, {query, key, value}, gradients);
            }),
            "nearfar::Additive: saved.query_weights is 0 x 0, but these inputs need 6 x " +
                std::to_string(detail::PoolingShape{4, 5}.padded()) + ": save it by a forward pass over them.");
  attention.forward(sample.inputs(), out, saved);
  saved.key_means.resize(1, 19);
  EXPECT_EQ(
      message_of([&] {
        attention.backward(sample.inputs(), out, saved, out, {query, key, value}, gradients);
      }),
      "nearfar::Additive: saved.key_means is 1 x 19, but these inputs need 1 x 20: save it by a forward pass over "
      "them.");
  gradients.w_k.resize(4, 5);
  EXPECT_EQ(message_of([&] {
              attention.backward(sample.inputs(), out, saved, out, {query, key, value}, gradients);
            }),
            "nearfar::Additive: the gradient of w_k must be 4 x 20, but is 4 x 5.");
  attention.parameters().w_t.resize(20, 19);
  EXPECT_EQ(message_of([&] { run_forward(attention, sample); }),
            "nearfar::Additive: w_t must be 20 x 20, but is 20 x 19.");
  Additive<float> streaming(small, {.causal = true});
  auto state = streaming.start();
  auto packed = sample;
  packed.query_offsets = {0, 2, 6};
  EXPECT_EQ(message_of([&] { streaming.extend(state, packed.inputs(), out); }),
            "nearfar::Additive: a stream is one sequence, but query_offsets has 3 numbers.");
}

// Rows of 16 MiB and more are stored past the caches, if they are aligned to vectors: these are and are not.
TEST(Additive, LargeMatricesAreStoredAsSmallOnesAre) {
  for (const Heads& heads : {Heads{8, 8, 64}, Heads{8, 4, 20}}) {
    for (const bool causal : {false, true}) {
      Additive<float> attention(heads, {.causal = causal, .transform = false});
      attention.parameters().for_each([](const auto&, Matrix<float>& matrix) { matrix.setConstant(0.02F); });
      const Index n = (Index{33} << 20) / Index{sizeof(float)} / heads.query_cols();
      const auto sample = random_sample<float>(heads, n, 31);
      const auto train = [&](Index margin) {
        const auto matrix = [&](Index cols) { return Matrix<float>(Matrix<float>::Zero(n, cols + margin)); };
        Matrix<float> out = matrix(heads.out_cols()), query = matrix(heads.query_cols());
        Matrix<float> key = matrix(heads.key_cols()), value = matrix(heads.value_cols());
        const auto inner = [&](Matrix<float>& of) { return Tokens<float>(of).middle_cols(margin, of.cols() - margin); };
        Additive<float>::Saved saved;
        auto gradients = attention.parameters();
        attention.forward(sample.inputs(), inner(out), saved);
        attention.backward(sample.inputs(), inner(out), saved, sample.query, {inner(query), inner(key), inner(value)},
                           gradients);
        return std::array<Matrix<float>, 4>{out.rightCols(heads.out_cols()), query.rightCols(heads.query_cols()),
                                            key.rightCols(heads.key_cols()), value.rightCols(heads.value_cols())};
      };
      const auto aligned = train(0);
      const auto unaligned = train(1);
      for (std::size_t i = 0; i < aligned.size(); ++i) EXPECT_TRUE(same_bits(aligned[i], unaligned[i])) << i;
    }
  }
}

}  // namespace
}  // namespace nearfar::test
